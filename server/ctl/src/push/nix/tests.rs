//! What Nix 2.26.3 and 2.34.8 wrote about the same paths, and what older versions write.

use narlake_format::nix::hash::Sha256Hash;

use super::*;

const ADDED: &str = r#""ca":"fixed:r:sha256:05h58w8k09ywwqq14biql39lxwzyhsjbnyn0jkz06cyz7xsm9z0d","deriver":null,"narHash":"sha256-DfxUdT/fMwP+lMB6u6SG/vNO06A4LhIw5twnMBFHBRY=","narSize":648,"references":[],"registrationTime":1795394985,"signatures":[],"ultimate":false"#;
const PATH: &str = "/nix/store/s1g4g3n6lg8iv0422i2kkcafp6xpbii9-d";
const HEX: &str = "0dfc54753fdf3303fe94c07abba486fef34ed3a0382e1230e6dc273011470516";

fn read(text: &str) -> Result<Vec<NarInfo>, PathInfoError> {
    parse_path_info(&StoreDir::default(), text.as_bytes())
}

fn added() -> NarInfo {
    let nar_hash = Sha256Hash::parse_hex(HEX).unwrap();
    NarInfo {
        store_path: PATH.trim_start_matches("/nix/store/").parse().unwrap(),
        url: format!("nar/{}.nar", nar_hash.to_base32()),
        compression: Compression::None,
        file_hash: Some(nar_hash),
        file_size: Some(648),
        nar_hash,
        nar_size: 648,
        references: Vec::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some("fixed:r:sha256:05h58w8k09ywwqq14biql39lxwzyhsjbnyn0jkz06cyz7xsm9z0d".parse().unwrap()),
        extra: Vec::new(),
    }
}

#[test]
fn every_shape_of_path_info() {
    let check = |text: &str| assert_eq!(read(text).unwrap(), [added()], "{text}");
    // 2.26.3, and 2.34.8 with --json-format 1.
    check(&format!(r#"{{"{PATH}":{{{ADDED}}}}}"#));
    check(&format!(r#"{{"{PATH}":{{{ADDED},"storeDir":"/nix/store","version":1}}}}"#));
    // 2.34.8 with --json-format 2.
    check(
        r#"{"info":{"s1g4g3n6lg8iv0422i2kkcafp6xpbii9-d":{"ca":{"hash":"sha256-DfxUdT/fMwP+lMB6u6SG/vNO06A4LhIw5twnMBFHBRY=","method":"nar"},"deriver":null,"narHash":"sha256-DfxUdT/fMwP+lMB6u6SG/vNO06A4LhIw5twnMBFHBRY=","narSize":648,"references":[],"registrationTime":1795394985,"signatures":[],"storeDir":"/nix/store","ultimate":false,"version":2}},"storeDir":"/nix/store","version":2}"#,
    );
    // To 2.18.
    check(&format!(r#"[{{"path":"{PATH}",{ADDED},"valid":true}}]"#));
}

#[test]
fn references_signatures_and_derivers() {
    let a = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-a";
    let b = "1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-b";
    let signature = format!("key-1:{}==", "A".repeat(86));
    let text = format!(
        r#"{{"{PATH}":{{"narHash":"sha256:{HEX}","narSize":1,"references":["/nix/store/{b}","/nix/store/{a}"],
        "deriver":"/nix/store/{a}.drv","signatures":["{signature}"]}}}}"#
    );
    let info = read(&text).unwrap().remove(0);
    assert_eq!(info.references, [a.parse().unwrap(), b.parse().unwrap()]);
    assert_eq!(info.deriver, Some(format!("{a}.drv").parse().unwrap()));
    assert_eq!(info.signatures, [signature.parse().unwrap()]);
    assert_eq!(info.ca, None);
    let base_names = text.replace("/nix/store/", "").replace("s1g4", "/nix/store/s1g4");
    assert_eq!(read(&base_names).unwrap(), [info]);
}

#[test]
fn unknown_paths_are_left_out() {
    assert_eq!(
        read(&format!(r#"{{"/nix/store/0000hdbcgnq8x9gdhcf5xwqz0ll6xm6a-x":null,"{PATH}":{{{ADDED}}}}}"#)).unwrap(),
        [added()]
    );
    assert_eq!(read("{}").unwrap(), []);
    assert_eq!(read("[]").unwrap(), []);
}

#[test]
fn nonsense_is_refused() {
    let good = format!(r#"{{"{PATH}":{{{ADDED}}}}}"#);
    for (from, to) in [
        (PATH, "/nix/store/x"),
        (PATH, "/gnu/store/s1g4g3n6lg8iv0422i2kkcafp6xpbii9-d"),
        ("sha256-Dfx", "sha512-Dfx"),
        ("648", "0"),
        ("648", "-1"),
        ("648", "1099511627777"),
        ("fixed:r", "unfixed"),
        (r#""references":[]"#, r#""references":["x"]"#),
        (r#""signatures":[]"#, r#""signatures":["x"]"#),
        (r#""deriver":null"#, r#""deriver":"x""#),
        (r#"{""#, r#"{{""#),
    ] {
        assert!(read(&good.replacen(from, to, 1)).is_err(), "{from} -> {to}");
    }
    assert!(read("").is_err());
}

#[test]
fn the_database_as_text() {
    let dir = StoreDir::default();
    let read = |text: &str| parse_database(&dir, text.as_bytes());
    let two = format!("{PATH}\n{HEX}\n648\n\n0\n{PATH}\n{HEX}\n648\n{PATH}.drv\n1\n{PATH}\n");
    let infos = read(&two).unwrap();
    assert_eq!(infos.len(), 2);
    assert_eq!(infos[0], NarInfo { ca: None, ..added() });
    assert_eq!(infos[1].references, [added().store_path]);
    assert_eq!(infos[1].deriver.as_ref().unwrap().to_string(), "s1g4g3n6lg8iv0422i2kkcafp6xpbii9-d.drv");
    assert_eq!(read("").unwrap(), []);
    for lines in [1, 2, 3, 4, 6, 9, 10] {
        let cut: Vec<&str> = two.lines().take(lines).collect();
        assert!(read(&cut.join("\n")).is_err(), "{lines} lines");
    }
}
