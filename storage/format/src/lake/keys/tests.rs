//! Keys: their one spelling, and the prefixes they lie under.

use proptest::prelude::*;

use super::*;
use crate::id::Ulid;
use crate::nix::strategies::{name, sha256, store_path};

const ID: &str = "01jdd3yq0000000000000000zz";
const CACHE: &str = "01jdd3yq00000000000000000c";
const HASH32: &str = "0123456789abcdfghijklmnpqrsvwxyz";

#[test]
fn spellings() {
    let file = Sha256Hash::of(b"").to_base32();
    let hex = Sha256Hash::of(b"").to_hex();
    let keys = [
        format!("lake/{ID}.json"),
        format!("packs/public/{ID}"),
        format!("packs/{CACHE}/{ID}"),
        format!("segments/00/{ID}"),
        format!("segments/17/{ID}"),
        format!("caches/{CACHE}/paths/{HASH32}/{ID}"),
        format!("caches/{CACHE}/config/{ID}"),
        format!("caches/{CACHE}/uploads/{file}/{ID}"),
        format!("caches/{CACHE}/files/{file}"),
        format!("caches/{CACHE}/realisations/{hex}/out"),
        format!("caches/{CACHE}/build-trace/{HASH32}-x.drv/out"),
        format!("caches/{CACHE}/logs/{HASH32}-x.drv"),
        format!("journal/{ID}"),
        format!("condemned/{ID}"),
        format!("damaged/public/{ID}/0000001f"),
        format!("tombstones/{CACHE}/{HASH32}/{ID}"),
        format!("leases/{ID}"),
        format!("pins/{ID}"),
        format!("access/2026-11-23/{ID}-{CACHE}"),
        format!("tokens/revoked/{ID}"),
    ];
    for key in keys {
        assert_eq!(key.parse::<Key>().map(|parsed| parsed.to_string()), Ok(key.clone()));
        for other in [key.to_uppercase(), format!("{key}/"), format!("/{key}"), key.replacen('/', "//", 1)] {
            assert!(other.parse::<Key>().is_err(), "{other}");
        }
        // Longer and shorter names are names too.
        let ends_in_name = key.ends_with("out") || key.ends_with("drv");
        assert!(ends_in_name || format!("{key}x").parse::<Key>().is_err(), "{key}x");
        for end in 0..key.len() {
            let shorter = &key[..end];
            assert!(ends_in_name || shorter.parse::<Key>().is_err(), "{shorter}");
        }
    }
}

#[test]
fn other_spellings_of_numbers() {
    for key in ["segments/0/", "segments/000/", "segments/+1/", "segments/100/"] {
        assert!(format!("{key}{ID}").parse::<Key>().is_err(), "{key}");
    }
    for offset in ["1f", "0000001F", "+000001f", "00000001f"] {
        assert!(format!("damaged/public/{ID}/{offset}").parse::<Key>().is_err(), "{offset}");
    }
}

#[test]
fn days() {
    for (seconds, text) in [
        (0, "1970-01-01"),
        (951_782_399, "2000-02-28"),
        (951_782_400, "2000-02-29"),
        (951_868_800, "2000-03-01"),
        (4_107_542_400, "2100-03-01"),
        (1_795_392_000, "2026-11-23"),
        (253_402_300_799, "9999-12-31"),
        (u64::MAX, "9999-12-31"),
    ] {
        assert_eq!(Day::of_unix_time(seconds).to_string(), text);
        assert_eq!(text.parse(), Ok(Day::of_unix_time(seconds)));
    }
    for text in [
        "",
        "1969-12-31",
        "2026-02-29",
        "2100-02-29",
        "2026-13-01",
        "2026-00-01",
        "2026-1-01",
        "10000-01-01",
        "2026-01-32",
    ] {
        assert!(text.parse::<Day>().is_err(), "{text}");
    }
}

fn ulid() -> impl Strategy<Value = Ulid> {
    any::<[u8; 16]>().prop_map(Ulid::from_bytes)
}

fn pack_ref() -> impl Strategy<Value = PackRef> {
    (prop::option::of(ulid()), ulid()).prop_map(|(domain, id)| {
        let domain = domain.map_or(Domain::Public, |id| Domain::Cache(CacheId(id)));
        PackRef { domain, id: PackId(id) }
    })
}

fn key() -> impl Strategy<Value = Key> {
    let cache = || ulid().prop_map(CacheId);
    let hash = || any::<[u8; 20]>().prop_map(StorePathHash::from_bytes);
    let by_hash =
        (sha256(), name()).prop_map(|(drv_hash, output)| RealisationKey::Hash(DrvOutput { drv_hash, output }));
    let by_path = (store_path(), name()).prop_map(|(drv, output)| RealisationKey::Path { drv, output });
    let day = (0..=u64::from(DAY_MAX) * DAY_S).prop_map(Day::of_unix_time);
    prop_oneof![
        ulid().prop_map(|id| Key::Lake(LakeId(id))),
        pack_ref().prop_map(Key::Pack),
        (0..=LEVEL_MAX, ulid()).prop_map(|(level, id)| Key::Segment(level, SegmentId(id))),
        (cache(), hash(), ulid()).prop_map(|(cache, path, id)| Key::PathRecord(cache, path, GenerationId(id))),
        (cache(), ulid()).prop_map(|(cache, id)| Key::Config(cache, ConfigId(id))),
        (cache(), sha256(), ulid()).prop_map(|(cache, file, id)| Key::Upload(cache, file, UploadId(id))),
        (cache(), sha256()).prop_map(|(cache, file)| Key::File(cache, file)),
        (cache(), prop_oneof![by_hash, by_path]).prop_map(|(cache, key)| Key::Realisation(cache, key)),
        (cache(), store_path()).prop_map(|(cache, drv)| Key::Log(cache, drv)),
        ulid().prop_map(|id| Key::Journal(JournalId(id))),
        ulid().prop_map(|id| Key::Condemned(CondemnationId(id))),
        (pack_ref(), any::<u32>()).prop_map(|(pack, offset)| Key::Damaged(pack, offset)),
        (cache(), hash(), ulid()).prop_map(|(cache, path, id)| Key::Tombstone(cache, path, TombstoneId(id))),
        ulid().prop_map(|id| Key::Lease(LeaseId(id))),
        ulid().prop_map(|id| Key::Pin(PinId(id))),
        (day, ulid(), ulid()).prop_map(|(day, replica, id)| Key::Access(day, ReplicaId(replica), AccessId(id))),
        ulid().prop_map(|id| Key::Revoked(TokenId(id))),
    ]
}

proptest! {
    #[test]
    fn parsing_is_the_inverse_of_writing(key in key()) {
        let text = key.to_string();
        prop_assert!(text.is_ascii() && !text.contains("//") && text.len() < 512);
        prop_assert_eq!(text.parse(), Ok(key));
    }

    /// What parses is what would be written.
    #[test]
    fn one_spelling(key in key(), at in any::<prop::sample::Index>(), byte in "[ -~]") {
        let mut text = key.to_string();
        let at = at.index(text.len());
        text.replace_range(at..=at, &byte);
        if let Ok(parsed) = text.parse::<Key>() {
            prop_assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn keys_lie_under_their_prefixes(cache_id in ulid(), path in any::<[u8; 20]>(), file_hash in sha256(), id in ulid(), pack_id in pack_ref()) {
        let (cache_id, path) = (CacheId(cache_id), StorePathHash::from_bytes(path));
        let record = path_record(&cache_id, &path, &GenerationId(id));
        prop_assert!(record.starts_with(&path_generations(&cache_id, &path)));
        prop_assert!(record.starts_with(&path_records(&cache_id)) && record.starts_with(&cache(&cache_id)));
        prop_assert!(cache(&cache_id).starts_with(CACHES));
        prop_assert!(config(&cache_id, &ConfigId(id)).starts_with(&configs(&cache_id)));
        prop_assert!(upload(&cache_id, &file_hash, &UploadId(id)).starts_with(&uploads(&cache_id, &file_hash)));
        prop_assert!(pack(&pack_id).starts_with(&packs_of(&pack_id.domain)) && pack(&pack_id).starts_with(PACKS));
        prop_assert!(damaged(&pack_id, 7).starts_with(&damaged_in(&pack_id)) && damaged(&pack_id, 7).starts_with(DAMAGED));
        prop_assert!(segment(3, &SegmentId(id)).starts_with(SEGMENTS));
        prop_assert_eq!(parse_pack(&pack(&pack_id)), Some(pack_id));
        prop_assert_eq!(parse_segment(&segment(3, &SegmentId(id))), Some((3, SegmentId(id))));
    }
}
