//! The same seed is the same run.

use narlake_sim::{Actor, Model, Objects, Plan, Request, StateDir, World, for_each_seed};

/// One push after the other: every request in the same order, and the same bucket at the end.
fn sequential(seed: u64) -> (Vec<Vec<Request>>, Vec<(String, bytes::Bytes)>) {
    let mut world = World::new(seed);
    let mut objects = Objects::new(seed);
    let mut model = Model::default();
    let mut traces = Vec::new();
    for life in 0..3 {
        let plan = Plan::Random { seed: seed ^ life, per_mille: 40, crash_at: (life == 1).then_some(60) };
        let life = world.life(plan, StateDir::Kept, async |actor: Actor| {
            for _ in 0..3 {
                let there = model.all_acknowledged();
                let object = objects.object(&there);
                model.trying(&object);
                if let Ok(published) = actor.push_until_done(&object).await {
                    model.acknowledged(&object.path.hash, published.record.info().nar_hash);
                }
                actor.read_and_compare(&model, &object.path.hash).await;
            }
        });
        traces.push(life.trace);
    }
    (traces, world.bucket())
}

#[test]
fn one_push_at_a_time_is_the_same_run() {
    for_each_seed("one_push_at_a_time_is_the_same_run", 3, |seed| {
        let (first, second) = (sequential(seed), sequential(seed));
        for (one, other) in first.0.iter().zip(&second.0) {
            let differ = one.iter().zip(other).position(|(a, b)| a != b);
            assert!(differ.is_none() && one.len() == other.len(), "request {differ:?}: {one:#?}\n{other:#?}");
        }
        assert!(first.1 == second.1, "the same requests left another bucket");
        assert!(first.0.iter().flatten().any(|request| request.fault.is_some()), "no fault was drawn");
    });
}

/// Two pushes at once: which pack holds what, and every id, may differ; what is stored may not.
fn concurrent(seed: u64) -> Vec<(String, Vec<u8>)> {
    let mut world = World::new(seed);
    let mut objects = Objects::new(seed);
    let (one, other) = (objects.object(&[]), objects.object(&[]));
    let mut model = Model::default();
    for object in [&one, &other] {
        model.trying(object);
    }
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        let (first, second) = tokio::join!(actor.push(&one), actor.push(&other));
        for (object, pushed) in [(&one, first), (&other, second)] {
            model.acknowledged(&object.path.hash, pushed.expect("pushes").record.info().nar_hash);
        }
    });
    life.result.expect("opens");
    world.check(&model);
    let names = world.bucket().into_iter().map(|(key, bytes)| (without_ids(&key), content(&key, &bytes)));
    let mut names: Vec<_> = names.filter(|(key, _)| !key.starts_with("packs/")).collect();
    names.sort_unstable();
    names
}

/// Ulids are 26 characters between slashes.
fn without_ids(key: &str) -> String {
    let parts: Vec<&str> = key.split('/').map(|part| if part.len() == 26 { "<id>" } else { part }).collect();
    parts.join("/")
}

/// Uploads name packs; all else is compared.
fn content(key: &str, bytes: &[u8]) -> Vec<u8> {
    if key.contains("/uploads/") || key.starts_with("lake/") { Vec::new() } else { bytes.to_vec() }
}

#[test]
fn two_pushes_at_once_store_the_same() {
    for_each_seed("two_pushes_at_once_store_the_same", 3, |seed| {
        assert!(concurrent(seed) == concurrent(seed), "two runs of one seed differ in more than ids");
    });
}
