//! Objects of the bucket that are lost or harmed: what is read is right or an error, never anything else; pushing again
//! heals.

use bytes::Bytes;
use narlake_format::lake::keys;
use narlake_sim::{Actor, At, Damage, Model, Object, Objects, Plan, StateDir, World};
use narlake_storage::ErrorKind;

/// A bucket with a few paths, in several packs and segments.
struct Held {
    bucket: Vec<(String, Bytes)>,
    model: Model,
    made: Vec<Object>,
}

impl Held {
    fn new(seed: u64) -> Self {
        let mut objects = Objects::new(seed);
        let mut model = Model::default();
        let mut world = World::new(seed);
        let mut made: Vec<Object> = Vec::new();
        for pushes in [1, 2] {
            let life = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| {
                for _ in 0..pushes {
                    let below: Vec<_> = made.iter().map(|object| object.path.clone()).collect();
                    let object = objects.object(&below);
                    model.trying(&object);
                    let published = actor.push(&object).await.expect("pushes");
                    model.acknowledged(&object.path.hash, published.record.info().nar_hash);
                    made.push(object);
                }
                actor.lake.close().await.expect("closes");
            });
            life.result.expect("opens");
        }
        Self { bucket: world.bucket(), model, made }
    }
}

/// Reads what can be read, and says how much that is. A path whose record was deleted is absent to any reader.
async fn read_all(actor: &Actor, model: &Model) -> usize {
    let mut whole = 0;
    for path in model.paths() {
        if let Ok(Some((record, nar))) = actor.read(&path).await {
            assert!(nar == model.expect(&path, record.info().nar_hash).nar, "{path}: other bytes than were pushed");
            whole += 1;
        }
    }
    whole
}

/// Every object of the bucket but the two that nothing can be rebuilt from, in every way, under a server that runs and
/// under one that starts.
#[test]
fn each_object_in_turn() {
    let held = Held::new(5);
    for (key, _) in held.bucket.iter().filter(|(key, _)| !is_configuration(key)) {
        for damage in Damage::ALL {
            check(&held, key, damage, true);
            check(&held, key, damage, false);
        }
    }
}

fn is_configuration(key: &str) -> bool {
    key.starts_with(keys::LAKE) || key.contains("/config/")
}

/// The lake's own document and a cache's configuration are not guessed at: no lake opens that is not the one it was, and
/// none in which the cache is another.
#[test]
fn configuration_is_not_guessed_at() {
    let held = Held::new(6);
    for (key, original) in held.bucket.iter().filter(|(key, _)| is_configuration(key)) {
        for damage in Damage::ALL {
            let _at = At(format!("{key} {damage:?}"));
            let mut world = World::holding(60, &held.bucket);
            world.damage(key, damage);
            let life = world.life(Plan::Calm, StateDir::Kept, async |_| ());
            // A lake whose document is gone would be taken for an empty bucket but for its caches.
            let error = life.result.expect_err("a lake that cannot be the same");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
            world.set(key, original.clone());
            world.check(&held.model);
        }
    }
}

fn check(held: &Held, key: &str, damage: Damage, running: bool) {
    let at = format!("{key} {damage:?}, {}", if running { "under a server" } else { "before the start" });
    let _at = At(at.clone());
    let Held { bucket, model, made } = held;
    let mut world = World::holding(50, bucket);
    if !running {
        world.damage(key, damage);
    }
    let healed = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        if running {
            actor.store.damage(key, damage).await;
        }
        read_all(&actor, model).await;
        // Whoever misses something pushes it again; a second time, where the first only found out what is wrong.
        for object in made {
            let mut pushed = actor.push_again(object).await;
            if pushed.is_err() {
                pushed = actor.push_again(object).await;
            }
            pushed.unwrap_or_else(|e| panic!("{at}: {} is not healed: {}", object.path, e.chain()));
        }
        assert_eq!(read_all(&actor, model).await, made.len(), "{at}: healed, and not readable");
    });
    healed.result.unwrap_or_else(|e| panic!("{at}: the lake does not open: {}", e.chain()));
    world.check(model);
}

/// Rule 5: *the NAR is uploaded; what it was stored as is lost; the narinfo comes.* The path is refused, not published
/// and then unreadable, and sending the NAR again helps.
#[test]
fn an_upload_whose_content_was_lost() {
    for damage in [Damage::Deleted, Damage::Truncated] {
        for state in [StateDir::Kept, StateDir::Empty] {
            let mut world = World::new(8);
            let object = Objects::new(8).object(&[]);
            let mut model = Model::default();
            model.trying(&object);
            let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| actor.send(&object).await);
            for pack in life.result.expect("opens").expect("sends").packs {
                world.damage(&keys::pack(&pack), damage);
            }
            let life = world.life(Plan::Calm, state, async |actor: Actor| {
                let error = actor.publish(&object).await.expect_err("its content is lost");
                assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Corrupt), "{}", error.chain());
                assert!(!actor.lake.has_upload(&actor.cache, &object.upload()).await.expect("answers"));
            });
            life.result.expect("opens");
            world.check(&model);
            let life = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| actor.push(&object).await);
            let published = life.result.expect("opens").expect("heals");
            model.acknowledged(&object.path.hash, published.record.info().nar_hash);
            world.check(&model);
        }
    }
}
