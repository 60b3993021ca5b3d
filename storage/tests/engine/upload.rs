//! NARs between their upload and their narinfo (docs/consistency.md, rules 5 and 18).

use std::time::Duration;

use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_sim::{Actor, Objects, Plan, StateDir, World};
use narlake_storage::{Error, Rejection, UploadName};

/// An upload counts for a day, on any server; asking for it prolongs that; then the NAR is sent again.
#[test]
fn lifetime() {
    const HOUR: Duration = Duration::from_secs(3600);
    let mut world = World::new(1);
    let object = Objects::new(1).object(&[]);
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| actor.send(&object).await.map(|_| ()));
    life.result.unwrap().unwrap();
    let mut has = |after: Duration| {
        world.clock.advance(after);
        let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
            actor.lake.has_upload(&actor.cache, &object.upload()).await
        });
        life.result.unwrap().unwrap()
    };
    assert!(has(Duration::ZERO));
    assert!(has(23 * HOUR), "within a day");
    assert!(has(23 * HOUR), "a day after it was last asked for");
    assert!(!has(25 * HOUR), "long after");
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        let error = actor.publish(&object).await.expect_err("it has expired");
        assert!(matches!(error, Error::Rejected { reason: Rejection::NoUpload(_), .. }), "{}", error.chain());
        let sent = actor.send(&object).await.unwrap();
        assert_eq!(sent.stats.bytes_stored, 0, "its content is still there");
        actor.publish(&object).await.unwrap();
        // Published, it is there for good.
        assert!(actor.lake.has_upload(&actor.cache, &object.upload()).await.unwrap());
    });
    life.result.unwrap();
    world.clock.advance(40 * 24 * HOUR);
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        assert!(actor.lake.has_upload(&actor.cache, &object.upload()).await.unwrap());
        let record = actor.lake.uploaded(&actor.cache, &object.upload()).await.unwrap().expect("the path it became");
        assert_eq!(record.info().store_path, object.path);
    });
    life.result.unwrap();
}

/// A second upload of one NAR, compressed otherwise, resolves as well; a name that nobody uploaded does not, however it
/// is claimed.
#[test]
fn names_resolve() {
    let mut world = World::new(2);
    let object = Objects::new(2).object(&[]);
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        actor.push(&object).await.unwrap();
        let second = UploadName { file_hash: Sha256Hash::of(b"as xz"), compression: Compression::Xz };
        let ingested = actor.send(&object).await.unwrap();
        actor.lake.keep_upload(&actor.cache, &second, &ingested).await.unwrap();
        let claimed = UploadName { file_hash: Sha256Hash::of(b"of somebody else"), compression: Compression::Xz };
        for name in [&second, &claimed] {
            let mut info = object.info();
            info.url = format!("nar/{}.nar.xz", name.file_hash.to_base32());
            info.compression = Compression::Xz;
            actor.lake.publish(&actor.cache, info, &[]).await.unwrap();
        }
        let found = actor.lake.uploaded(&actor.cache, &second).await.unwrap();
        assert_eq!(found.map(|record| record.info().store_path.clone()), Some(object.path.clone()));
        assert!(actor.lake.uploaded(&actor.cache, &claimed).await.unwrap().is_none());
    });
    life.result.unwrap();
}
