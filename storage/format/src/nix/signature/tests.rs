use proptest::prelude::*;

use super::super::hash::parse_hex;
use super::super::strategies::signature;
use super::*;

fn hex<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    assert!(parse_hex(text.as_bytes(), &mut bytes));
    bytes
}

/// RFC 8032, section 7.1, test 2.
#[test]
fn rfc_8032() {
    let seed = hex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb");
    let public: [u8; 32] = hex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
    let expected: [u8; 64] = hex(concat!(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da",
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ));
    let key = SecretKey::generate("rfc-1", seed).unwrap();
    let signature = key.sign(&[0x72]);
    assert_eq!(signature.as_bytes(), &expected);
    assert_eq!(key.public().to_string(), format!("rfc-1:{}", BASE64.encode(public)));
    assert!(key.public().verify(&[0x72], &signature));
    assert!(!key.public().verify(&[0x73], &signature));
    assert!(!key.public().verify(&[], &signature));
}

#[test]
fn keys() {
    let key = SecretKey::generate("cache-1", [7; 32]).unwrap();
    let text = key.to_secret_text();
    let again: SecretKey = text.parse().unwrap();
    assert_eq!(again.to_secret_text(), text);
    assert_eq!(again.public(), key.public());
    assert_eq!(key.public().to_string().parse(), Ok(key.public()));
    assert_eq!(format!("{key:?}"), "SecretKey(cache-1:..)");

    // By name too: two keys of one name are told apart by arithmetic, two names of one key are not one key.
    let renamed = SecretKey::generate("cache-2", [7; 32]).unwrap();
    assert!(!renamed.public().verify(b"message", &key.sign(b"message")));

    let nixos = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
    assert_eq!(nixos.parse::<PublicKey>().unwrap().to_string(), nixos);

    // A secret key whose public half is another's.
    let other = SecretKey::generate("cache-1", [8; 32]).unwrap().to_secret_text();
    let mixed = format!("{}{}", &text[..text.len() - 44], &other[other.len() - 44..]);
    assert!(mixed.parse::<SecretKey>().is_err());
}

#[test]
fn refusals() {
    let digits = BASE64.encode([1; 64]);
    assert!(format!("a:{digits}").parse::<Signature>().is_ok());
    for text in [
        "",
        ":",
        "a:",
        &digits,
        &format!(":{digits}"),
        &format!("a b:{digits}"),
        &format!("a\n:{digits}"),
        &format!("\u{e4}:{digits}"),
        &format!("a:b:{digits}"),
        &format!("a:{digits} "),
        &format!("a:{}", digits.trim_end_matches('=')),
        &format!("a:{}", BASE64.encode([1; 63])),
        &format!("a:{}", BASE64.encode([1; 65])),
        &format!("a:{}", digits.replace("Q==", "R==")), // bits beyond the signature
        &format!("{}:{digits}", "a".repeat(KEY_NAME_MAX + 1)),
    ] {
        assert!(text.parse::<Signature>().is_err(), "{text:?}");
    }
    assert!(format!("a:{digits}").parse::<PublicKey>().is_err());
    assert!(SecretKey::generate("", [0; 32]).is_err());
    assert!(SecretKey::generate("a:b", [0; 32]).is_err());
}

proptest! {
    #[test]
    fn round_trip(signature in signature()) {
        prop_assert_eq!(signature.to_string().parse(), Ok(signature));
    }

    #[test]
    fn every_bit_counts(seed: [u8; 32], message: Vec<u8>, bit in 0..512_usize) {
        let key = SecretKey::generate("k", seed).unwrap();
        let mut signature = key.sign(&message);
        prop_assert!(key.public().verify(&message, &signature));
        signature.bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(!key.public().verify(&message, &signature));
    }
}
