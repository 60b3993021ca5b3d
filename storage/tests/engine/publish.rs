//! A narinfo that does not hold together, each in its own way; and what happens to one that comes twice.

use narlake_format::id::{CacheId, ConfigId, Ulid};
use narlake_format::lake::condemned;
use narlake_format::lake::config::{CacheDocument, Document as _, OnConflict, Visibility};
use narlake_format::lake::keys;
use narlake_format::lake::location::PackRef;
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::StoreDir;
use narlake_sim::Object;
use narlake_storage::{Error, ErrorKind, Outcome, Rejection, Settings};

use crate::kit::{Kit, directory, file, key, noise, object, path};

fn sample(name: &str) -> Object {
    object(name, &directory([("f", file(noise(1, 100_000)))]), &[])
}

/// Sends a good NAR and a narinfo that is changed, and says why it was refused.
async fn refused(kit: &Kit, object: &Object, change: impl FnOnce(&mut NarInfo)) -> (Rejection, ErrorKind) {
    kit.send(object).await;
    let mut info = object.info();
    change(&mut info);
    let hash = info.store_path.hash;
    let error = kit.lake.publish(&kit.cache, info, &[key()]).await.expect_err("must be refused");
    assert!(kit.lake.lookup(&kit.cache, &hash).await.unwrap().is_none(), "refused, and visible");
    let kind = error.kind();
    match error {
        Error::Rejected { reason, path } => {
            assert_eq!(path, object.path.to_string());
            (reason, kind)
        }
        other => panic!("{}", other.chain()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_lie_is_refused() {
    let kit = Kit::memory().await;
    let object = sample("liar");
    let other = Sha256Hash::of(b"other");

    let (reason, kind) = refused(&kit, &object, |info| info.nar_hash = other).await;
    assert!(matches!(reason, Rejection::NarHash { .. }), "{reason}");
    assert_eq!(kind, ErrorKind::Invalid);

    let (reason, _) = refused(&kit, &object, |info| info.nar_size += 8).await;
    assert!(matches!(reason, Rejection::NarSize { .. }), "{reason}");

    let (reason, _) = refused(&kit, &object, |info| info.url = format!("nar/{}.nar", other.to_base32())).await;
    assert!(matches!(reason, Rejection::NoUpload(_)), "{reason}");

    for url in ["", "nar/", "../nar/x.nar", "nar/x.nar", "nar/x.tar", "http://elsewhere/nar/x.nar"] {
        let (reason, _) = refused(&kit, &object, |info| info.url = url.to_owned()).await;
        assert!(matches!(reason, Rejection::Url(_)), "{url}: {reason}");
    }

    let (reason, _) = refused(&kit, &object, |info| info.references = vec![path("nowhere")]).await;
    assert!(matches!(reason, Rejection::MissingReference(_)), "{reason}");

    // The hash part is there, the name is another.
    kit.push(&sample("there")).await;
    let mut misnamed = path("there");
    misnamed.name = "elsewhere".parse().unwrap();
    let (reason, _) = refused(&kit, &object, |info| info.references = vec![misnamed]).await;
    assert!(matches!(reason, Rejection::MissingReference(_)), "{reason}");

    // A right one, for another path.
    let (reason, _) = refused(&kit, &object, |info| info.ca = Some(ContentAddress::NixArchive(info.nar_hash))).await;
    assert!(matches!(reason, Rejection::ContentAddress(_)), "{reason}");

    // A reference to itself needs nothing.
    let mut info = object.info();
    info.references = vec![object.path.clone()];
    kit.lake.publish(&kit.cache, info, &[key()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn content_addresses() {
    let kit = Kit::memory().await;
    let dir = StoreDir::default();
    let text = b"the text".to_vec();
    let cases = [
        (file(text.clone()), ContentAddress::Text(Sha256Hash::of(&text)), true),
        (file(text.clone()), ContentAddress::Flat(Sha256Hash::of(&text)), true),
        (file(text.clone()), ContentAddress::NixArchive(Sha256Hash::of(&file(text.clone()).nar())), true),
        (file(text.clone()), ContentAddress::Text(Sha256Hash::of(b"other")), false),
        (file(text.clone()), ContentAddress::NixArchive(Sha256Hash::of(b"other")), false),
        (directory([]), ContentAddress::Flat(Sha256Hash::of(b"")), false),
    ];
    for (n, (tree, ca, holds)) in cases.into_iter().enumerate() {
        let name = format!("ca-{n}").parse().unwrap();
        let store_path = ca.store_path(&dir, &name, &[], false).unwrap();
        let object = Object { path: store_path, nar: tree.nar(), references: Vec::new() };
        kit.send(&object).await;
        let mut info = object.info();
        info.ca = Some(ca);
        let published = kit.lake.publish(&kit.cache, info, &[key()]).await;
        assert_eq!(published.is_ok(), holds, "case {n}: {published:?}");
        if let Err(error) = published {
            assert!(matches!(error, Error::Rejected { reason: Rejection::ContentAddress(_), .. }), "{error}");
        }
    }
}

/// Rule 4: a push whose packs are about to go is acknowledged with its content in others.
#[tokio::test(flavor = "multi_thread")]
async fn condemned_content_is_moved() {
    let kit = Kit::memory().await;
    // One whose string table is a blob of its own.
    let below: Vec<Object> = (0..40).map(|n| sample(&format!("below-{n}-{}", "x".repeat(60)))).collect();
    for object in &below {
        kit.push(object).await;
    }
    let dir = StoreDir::default();
    let names: Vec<String> = below.iter().map(|below| below.path.display_in(&dir).to_string()).collect();
    let tree = directory([("f", file(noise(5, 1_000_000))), ("names", file(names.join(":")))]);
    let object = object("condemned", &tree, &below.iter().map(|below| &below.path).collect::<Vec<_>>());
    let ingested = kit.send(&object).await;
    let condemn = |n: u128, packs: Vec<PackRef>| {
        let key = format!("{}{}", keys::CONDEMNED, Ulid::from(n));
        let bucket = kit.bucket.clone();
        async move { bucket.put_new(&key, condemned::encode(&packs)).await.unwrap() }
    };
    condemn(5, ingested.packs.clone()).await;
    let published = kit.publish(&object).await.unwrap();
    assert_eq!(published.outcome, Outcome::New);
    assert!(published.record.inline_table().is_none(), "the table is short");
    // The collector goes on.
    for pack in &ingested.packs {
        kit.bucket.delete(&keys::pack(pack)).await.unwrap();
    }
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
    let reopened = Kit::over(kit.bucket.clone(), Settings::default()).await;
    assert!(reopened.nar(&object.path.hash).await.unwrap() == object.nar);
    // Who pushes what is there already relies on it no less.
    let packs = |objects: Vec<narlake_storage::bucket::ObjectInfo>| {
        objects.iter().filter_map(|object| keys::parse_pack(&object.key)).collect::<Vec<_>>()
    };
    let before = packs(kit.bucket.list(keys::PACKS, None).await.unwrap());
    condemn(6, before.clone()).await;
    assert_eq!(kit.publish(&object).await.unwrap().outcome, Outcome::Known);
    for pack in &before {
        kit.bucket.delete(&keys::pack(pack)).await.unwrap();
    }
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// What is condemned when a server starts is no dedup hit, and no answer to whoever asks what needs no upload.
#[tokio::test(flavor = "multi_thread")]
async fn condemned_content_is_not_relied_on() {
    let kit = Kit::memory().await;
    let object = sample("condemned");
    let ingested = kit.send(&object).await;
    assert!(kit.lake.has_upload(&kit.cache, &object.upload()).await.unwrap());
    let key = format!("{}{}", keys::CONDEMNED, Ulid::from(5));
    kit.bucket.put_new(&key, condemned::encode(&ingested.packs)).await.unwrap();
    let kit = Kit::over(kit.bucket.clone(), Settings::default()).await;
    assert!(!kit.lake.has_upload(&kit.cache, &object.upload()).await.unwrap());
    let other = sample("another");
    let again = kit.send(&other).await;
    assert_eq!(again.stats.chunks_known, 0);
    assert!(again.packs.iter().all(|pack| !ingested.packs.contains(pack)));
    kit.publish(&other).await.unwrap();
    // A client that sent its NAR before all this and asks no more: nobody is turned away for what can be moved.
    kit.publish(&object).await.unwrap();
    for pack in &ingested.packs {
        kit.bucket.delete(&keys::pack(pack)).await.unwrap();
    }
    for object in [&object, &other] {
        assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
    }
}

/// Where the content of an upload is gone, and not merely about to go, its NAR must come again; and then it is there.
#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_gone() {
    let kit = Kit::memory().await;
    let object = sample("gone");
    let ingested = kit.send(&object).await;
    for pack in &ingested.packs {
        kit.bucket.delete(&keys::pack(pack)).await.unwrap();
    }
    let kit = Kit::over(kit.bucket.clone(), Settings::default()).await;
    let error = kit.publish(&object).await.expect_err("its content is gone");
    assert!(matches!(error, Error::Rejected { reason: Rejection::Condemned, .. }), "{}", error.chain());
    assert_eq!(error.kind(), ErrorKind::Conflict);
    kit.push(&object).await;
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// A batch of condemnations that cannot be read leaves open what is safe to rely on: nothing is acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn condemnations_that_cannot_be_read() {
    let kit = Kit::memory().await;
    let key = format!("{}{}", keys::CONDEMNED, Ulid::from(5));
    kit.bucket.put_new(&key, b"public/\n".to_vec()).await.unwrap();
    let object = sample("unknown");
    kit.send(&object).await;
    let error = kit.publish(&object).await.expect_err("who knows");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.chain().contains(&key), "{}", error.chain());
    Kit::over(kit.bucket.clone(), Settings::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_of_others_are_bounded() {
    let kit = Kit::memory().await;
    let object = sample("signed");
    let dir = StoreDir::default();
    let signed = |names: std::ops::Range<u32>| {
        let mut info = object.info();
        for n in names {
            info.sign(&dir, &SecretKey::generate(&format!("other-{n}"), [9; 32]).unwrap());
        }
        info
    };
    kit.send(&object).await;
    let error = kit.lake.publish(&kit.cache, signed(0..65), &[key()]).await.expect_err("too many");
    assert!(matches!(error, Error::Rejected { reason: Rejection::Signatures(65, 64), .. }), "{}", error.chain());
    kit.lake.publish(&kit.cache, signed(0..40), &[key()]).await.unwrap();
    // They add up, to no more than the limit; the path stays readable.
    let published = kit.lake.publish(&kit.cache, signed(40..100), &[key()]).await.unwrap();
    assert_eq!(published.record.info().signatures.len(), 64 + 1, "and the cache's own");
    // With no room for more, nothing more is written.
    let generations = kit.bucket.list("caches/", None).await.unwrap().len();
    kit.lake.publish(&kit.cache, signed(40..100), &[key()]).await.unwrap();
    assert_eq!(kit.bucket.list("caches/", None).await.unwrap().len(), generations);
    let reopened = Kit::over(kit.bucket.clone(), Settings::default()).await;
    assert!(reopened.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// A path that names itself is addressed by its content with that name left out.
#[tokio::test(flavor = "multi_thread")]
async fn content_addresses_with_a_reference_to_itself() {
    let kit = Kit::memory().await;
    let dir = StoreDir::default();
    let name = "self".parse().unwrap();
    let tree = |hash: &str| directory([("bin", file(format!("#!/nix/store/{hash}-self/sh\n{hash}")))]);
    let ca = ContentAddress::NixArchive(Sha256Hash::of(&tree(&"\0".repeat(32)).nar()));
    let own = ca.store_path(&dir, &name, &[], true).unwrap();
    let publish = async |content: &str, ca: ContentAddress| {
        let own = ca.store_path(&dir, &name, &[], true).unwrap();
        let nar = tree(content).nar();
        let object = Object { path: own.clone(), nar, references: vec![own] };
        kit.send(&object).await;
        let mut info = object.info();
        info.ca = Some(ca);
        kit.lake.publish(&kit.cache, info, &[key()]).await
    };
    publish(&own.hash.to_string(), ca).await.unwrap();
    // The path is that of the address, the content is another's.
    let forged = ContentAddress::NixArchive(Sha256Hash::of(b"something else"));
    let error = publish("", forged).await.expect_err("it is not what its address says");
    assert!(matches!(error, Error::Rejected { reason: Rejection::ContentAddress(_), .. }), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn twice() {
    let kit = Kit::memory().await;
    let object = sample("twice");
    assert_eq!(kit.push(&object).await.outcome, Outcome::New);
    assert_eq!(kit.push(&object).await.outcome, Outcome::Known);
    // With a signature that is new, it is kept.
    let upstream = SecretKey::generate("upstream-1", [9; 32]).unwrap();
    let mut info = object.info();
    info.sign(&StoreDir::default(), &upstream);
    let published = kit.lake.publish(&kit.cache, info, &[key()]).await.unwrap();
    assert_eq!(published.outcome, Outcome::Known);
    let names: Vec<_> = published.record.info().signatures.iter().map(|s| s.key_name().to_owned()).collect();
    assert_eq!(names, ["kit-1", "upstream-1"]);
    // Other content: the first stays.
    let mut other = sample("twice");
    other.nar = file("other").nar();
    let published = kit.push(&other).await;
    assert_eq!(published.outcome, Outcome::NotReproducible);
    assert_eq!(published.record.info().nar_hash, object.info().nar_hash);
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_may_refuse_other_content() {
    let kit = Kit::memory().await;
    let mut document = CacheDocument::new("strict".parse().unwrap(), Visibility::Private);
    document.on_conflict = OnConflict::Refuse;
    document.public_keys.push(key().public());
    let id = CacheId(Ulid::from(77));
    kit.bucket.put_new(&keys::config(&id, &ConfigId(Ulid::from(1))), document.encode()).await.unwrap();
    let strict = kit.lake.caches().await.unwrap().into_iter().find(|cache| cache.id() == id).unwrap();
    let kit = Kit { cache: strict, ..kit };
    let object = sample("strict");
    kit.push(&object).await;
    let mut other = object.clone();
    other.nar = file("other").nar();
    kit.send(&other).await;
    let error = kit.publish(&other).await.expect_err("the cache refuses");
    assert!(matches!(error, Error::Rejected { reason: Rejection::NotReproducible { .. }, .. }), "{}", error.chain());
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

/// Rules 15 and 16: a private cache's uploads, records and content are nobody else's.
#[tokio::test(flavor = "multi_thread")]
async fn caches_do_not_see_each_other() {
    let kit = Kit::memory().await;
    let mut document = CacheDocument::new("private".parse().unwrap(), Visibility::Private);
    document.public_keys.push(key().public());
    let id = CacheId(Ulid::from(78));
    kit.bucket.put_new(&keys::config(&id, &ConfigId(Ulid::from(1))), document.encode()).await.unwrap();
    let private = kit.lake.caches().await.unwrap().into_iter().find(|cache| cache.id() == id).unwrap();
    let object = sample("secret");
    let public = kit.cache.clone();
    let kit = Kit { cache: private, ..kit };
    let first = kit.send(&object).await;
    kit.publish(&object).await.unwrap();
    let kit = Kit { cache: public, ..kit };
    assert!(kit.lake.lookup(&kit.cache, &object.path.hash).await.unwrap().is_none());
    assert!(!kit.lake.has_upload(&kit.cache, &object.upload()).await.unwrap());
    let error = kit.publish(&object).await.expect_err("its NAR is in the other cache");
    assert!(matches!(error, Error::Rejected { reason: Rejection::NoUpload(_), .. }), "{}", error.chain());
    // Its chunks are no dedup hits either: whether they are there is nobody's business.
    let second = kit.send(&object).await;
    assert_eq!(second.stats.chunks_new, first.stats.chunks_new);
    assert!(second.packs.iter().all(|pack| !first.packs.contains(pack)));
}
