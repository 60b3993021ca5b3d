use super::*;

const ID: &str = "sha256:6b4cb47672f7e2adff9e58f684d1b149c503928be6b6130bee23231ee4d10363!out";
const DRV: &str = "bidkcs01mww363s4s7akdhbl6ws66b0z-ruby-2.7.3.drv";
const OUT: &str = "p4pclmv1gyja5kzc26npqpia1qqxrf0l-ruby-2.7.3";

#[test]
fn urls() {
    for url in [format!("realisations/{ID}.doi"), format!("build-trace-v2/{DRV}/out.doi")] {
        assert_eq!(url.parse::<RealisationKey>().unwrap().to_string(), url);
    }
    for url in [
        "",
        ID,
        &format!("realisations/{ID}"),
        &format!("realisations/x/{ID}.doi"),
        "realisations/.doi",
        "realisations/sha256:6b4c!out.doi",
        &format!("realisations/{}.doi", ID.replace('!', "%21")),
        &format!("realisations/{}.doi", ID.replace("out", "../out")),
        &format!("build-trace-v2/{DRV}.doi"),
        &format!("build-trace-v2/{DRV}/.doi"),
        &format!("build-trace-v2/{DRV}/a/b.doi"),
        &format!("build-trace-v2/../{DRV}/out.doi"),
    ] {
        assert!(url.parse::<RealisationKey>().is_err(), "{url}");
    }
}

#[test]
fn documents() {
    let by_hash: RealisationKey = format!("realisations/{ID}.doi").parse().unwrap();
    let by_path: RealisationKey = format!("build-trace-v2/{DRV}/out.doi").parse().unwrap();
    let accepted = |key: &RealisationKey, text: &str| Realisation::parse(key, text.as_bytes()).is_ok();

    let old =
        format!(r#"{{"dependentRealisations":{{"{ID}":"{OUT}"}},"id":"{ID}","outPath":"{OUT}","signatures":[]}}"#);
    let parsed = Realisation::parse(&by_hash, old.as_bytes()).unwrap();
    assert_eq!(parsed.out_path.to_string(), OUT);
    assert_eq!(parsed.dependent.len(), 1);
    let new = format!(r#"{{"outPath":"{OUT}","signatures":["a:b",{{"keyName":"a"}}],"more":1}}"#);
    assert!(accepted(&by_path, &new));

    // A document under the URL of another output.
    assert!(!accepted(&by_hash, &old.replace("!out\",\"outPath", "!dev\",\"outPath")));
    assert!(!accepted(&by_hash, &new));
    assert!(!accepted(&by_path, &old));

    for text in [
        "",
        "null",
        "[]",
        "{}",
        &old[..old.len() - 1],
        &format!("{old}{old}"),
        &old.replace(OUT, "ruby"),
        &old.replace(OUT, &format!("/nix/store/{OUT}")),
        &old.replace("[]", "null"),
        &old.replace(&format!("{{\"{ID}\":"), "{\"out\":"),
        &format!("{{\"outPath\":{}", "[".repeat(100_000)),
    ] {
        assert!(!accepted(&by_hash, text), "{}", &text[..text.len().min(200)]);
    }
    assert!(!accepted(&by_hash, &format!("{old}{}", " ".repeat(REALISATION_MAX))));
}

#[test]
fn damage_never_panics() {
    let key: RealisationKey = format!("realisations/{ID}.doi").parse().unwrap();
    let text = format!(r#"{{"id":"{ID}","outPath":"{OUT}","signatures":["a:b"]}}"#).into_bytes();
    for length in 0..text.len() {
        assert!(Realisation::parse(&key, &text[..length]).is_err());
    }
    let mut text = text;
    for bit in 0..text.len() * 8 {
        text[bit / 8] ^= 1 << (bit % 8);
        let _ = Realisation::parse(&key, &text);
        text[bit / 8] ^= 1 << (bit % 8);
    }
}
