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

const KEYS: [&str; 2] = [
    "realisations/sha256:6b4cb47672f7e2adff9e58f684d1b149c503928be6b6130bee23231ee4d10363!out.doi",
    "build-trace-v2/bidkcs01mww363s4s7akdhbl6ws66b0z-ruby-2.7.3.drv/out.doi",
];

/// The document of each form, without a signature.
fn document(key: &RealisationKey) -> String {
    match key {
        RealisationKey::Hash(_) => {
            format!(r#"{{"id":"{ID}","outPath":"{OUT}","more":[1],"dependentRealisations":{{"{ID}":"{OUT}"}}}}"#)
        }
        RealisationKey::Path { .. } => format!(r#"{{"outPath":"{OUT}","more":[1],"signatures":[{{"keyName":1}}]}}"#),
    }
}

#[test]
fn fingerprints() {
    for (url, expected) in KEYS.into_iter().zip([
        format!(r#"{{"dependentRealisations":{{"{ID}":"{OUT}"}},"id":"{ID}","outPath":"{OUT}"}}"#),
        format!(r#"{{"key":{{"drvPath":"{DRV}","outputName":"out"}},"value":{{"outPath":"{OUT}"}}}}"#),
    ]) {
        let key: RealisationKey = url.parse().unwrap();
        let parsed = Realisation::parse(&key, document(&key).as_bytes()).unwrap();
        assert_eq!(parsed.fingerprint(&key), expected);
        // As Nix makes it: the JSON without the signatures.
        let json: Value = serde_json::from_str(&expected).unwrap();
        assert_eq!(json.to_string(), expected);
    }
}

#[test]
fn signatures_are_added_once_and_hold_for_this_output_alone() {
    let signer = SecretKey::generate("cache-1", [7; 32]).unwrap();
    let other = SecretKey::generate("other-1", [8; 32]).unwrap();
    for url in KEYS {
        let key: RealisationKey = url.parse().unwrap();
        let plain = document(&key);
        let unsigned = Realisation::parse(&key, plain.as_bytes()).unwrap();
        assert!(unsigned.signatures.is_empty() && !unsigned.is_signed_by(&key, &[signer.public()]));
        let signed = Realisation::sign(&key, plain.as_bytes(), std::slice::from_ref(&signer)).unwrap();
        assert_eq!(Realisation::sign(&key, &signed, std::slice::from_ref(&signer)).unwrap(), signed);
        let parsed = Realisation::parse(&key, &signed).unwrap();
        assert!(parsed.is_signed_by(&key, &[other.public(), signer.public()]));
        assert!(!parsed.is_signed_by(&key, &[other.public()]) && !parsed.is_signed_by(&key, &[]));
        // What the cache does not know of stays.
        assert!(String::from_utf8(signed.clone()).unwrap().contains(r#""more":[1]"#));
        let both = Realisation::parse(&key, &Realisation::sign(&key, &signed, std::slice::from_ref(&other)).unwrap());
        assert_eq!(both.unwrap().signatures.len(), 2);
        // Another output, another path, other realisations that it was resolved through.
        let elsewhere: RealisationKey = url.replace("out.doi", "dev.doi").parse().unwrap();
        assert!(!parsed.is_signed_by(&elsewhere, &[signer.public()]));
        let moved = Realisation { out_path: DRV.parse().unwrap(), ..parsed.clone() };
        assert!(!moved.is_signed_by(&key, &[signer.public()]));
        if let RealisationKey::Hash(_) = key {
            let resolved = Realisation { dependent: BTreeMap::new(), ..parsed.clone() };
            assert!(!resolved.is_signed_by(&key, &[signer.public()]));
        }
        // And it is read from what is written of it alone.
        assert_eq!(Realisation::parse(&key, parsed.to_document(&key).as_bytes()), Ok(parsed));
    }
}
