//! Objects of the bucket that are lost or harmed: what is read is right or an error, never anything else; pushing again
//! heals.

use narlake_format::lake::keys;
use narlake_sim::{Actor, At, Damage, Model, Object, Objects, Plan, StateDir, World};

/// A world with a few paths, in several packs and a segment.
fn world(seed: u64) -> (World, Model, Vec<Object>) {
    let mut objects = Objects::new(seed);
    let mut model = Model::default();
    let mut world = World::new(seed);
    let mut made: Vec<Object> = Vec::new();
    for _ in 0..2 {
        let life = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| {
            for _ in 0..2 {
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
    (world, model, made)
}

async fn read_all(actor: &Actor, model: &Model) -> usize {
    let mut whole = 0;
    for path in model.paths() {
        // An acknowledged path whose record was deleted is lost to any reader; everything else must not be said absent.
        match actor.read(&path).await {
            Ok(Some((record, nar))) => {
                assert!(nar == model.expect(&path, record.info().nar_hash).nar, "{path}: other bytes than were pushed");
                whole += 1;
            }
            Ok(None) | Err(_) => {}
        }
    }
    whole
}

/// Every object of the bucket but the lake's own document, which nothing can be rebuilt from, in every way, under a
/// server that runs and under one that starts.
#[test]
fn each_object_in_turn() {
    let (first, ..) = world(5);
    let bucket = first.bucket();
    for (key, _) in bucket.iter().filter(|(key, _)| !key.starts_with(keys::LAKE)) {
        for damage in Damage::ALL {
            for running in [true, false] {
                check(key, damage, running);
            }
        }
    }
}

fn check(key: &str, damage: Damage, running: bool) {
    let at = format!("{key} {damage:?}, {}", if running { "under a server" } else { "before the start" });
    let _at = At(at.clone());
    let (mut world, model, made) = world(5);
    let total = made.len();
    if !running {
        world.damage(key, damage);
    }
    let healed = world.life(Plan::Calm, if running { StateDir::Kept } else { StateDir::Empty }, async |actor: Actor| {
        if running {
            actor.store.damage(key, damage).await;
        }
        let whole = read_all(&actor, &model).await;
        // Whoever misses something pushes it again; a second time, where the first only found out what is wrong.
        for object in &made {
            let mut pushed = actor.push_again(object).await;
            if pushed.is_err() {
                pushed = actor.push_again(object).await;
            }
            pushed.unwrap_or_else(|e| panic!("{at}: {} is not healed: {}", object.path, e.chain()));
        }
        assert_eq!(read_all(&actor, &model).await, total, "{at}: healed, and not readable");
        whole
    });
    match healed.result {
        Ok(_) => world.check(&model),
        // Configuration is not guessed at.
        Err(error) => assert!(key.contains("/config/"), "{at}: the lake does not open: {}", error.chain()),
    }
}
