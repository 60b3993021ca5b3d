//! One push, with a fault at its first request to the bucket, at its second, and so on until it passes untouched; for
//! each kind of fault.

use narlake_sim::{Actor, At, Fault, Model, Objects, Plan, StateDir, World};

/// A world that holds one path, and another path that refers to it.
fn check(fault: Fault) {
    let mut objects = Objects::new(11);
    let below = objects.object(&[]);
    let above = objects.object(std::slice::from_ref(&below.path));
    let mut first = World::new(11);
    let held = first.life(Plan::Calm, StateDir::Empty, async |actor: Actor| actor.push(&below).await.map(|_| ()));
    held.result.expect("opens").expect("pushes");
    let bucket = first.bucket();

    for number in 0.. {
        let mut world = World::holding(1000 + number, &bucket);
        let mut model = Model::default();
        model.trying(&below);
        model.acknowledged(&below.path.hash, below.info().nar_hash);
        model.trying(&above);
        let plan = Plan::At(number, fault);
        let life = world.life(plan, StateDir::Empty, async |actor: Actor| actor.push_until_done(&above).await);
        let Some(request) = usize::try_from(number).ok().and_then(|number| life.trace.get(number)) else { break };
        if request.fault.is_none() {
            // This kind of fault does not befall this kind of request.
            continue;
        }
        let at = format!("{fault:?} at request {number}, {}", request.name);
        let _at = At(at.clone());
        let crash = matches!(fault, Fault::CrashBefore | Fault::CrashAfter);
        assert_eq!(life.crashed, crash, "{at}");
        match life.result {
            Ok(Ok(published)) => model.acknowledged(&above.path.hash, published.record.info().nar_hash),
            // A server that does not come up at a bad answer comes up at the next try; one that lives gets there.
            Ok(Err(error)) => assert!(crash, "{at}: {}", error.chain()),
            Err(_) => {}
        }
        world.check(&model);
        // Whatever became of it, the client that pushes again gets there, with the local state that was left.
        let again = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| actor.push(&above).await);
        let published = again.result.expect("opens").unwrap_or_else(|e| panic!("{at}, pushed again: {}", e.chain()));
        model.acknowledged(&above.path.hash, published.record.info().nar_hash);
        world.check(&model);
    }
}

#[test]
fn lost_request() {
    check(Fault::Before);
}

#[test]
fn lost_answer() {
    check(Fault::After);
}

#[test]
fn late_request() {
    check(Fault::Slow);
}

#[test]
fn answer_after_the_time_limit() {
    check(Fault::Stuck);
}

#[test]
fn truncated_body() {
    check(Fault::Truncated);
}

#[test]
fn flipped_bit() {
    check(Fault::Flipped);
}

#[test]
fn body_breaks_off() {
    check(Fault::Reset);
}

#[test]
fn crash_before_request() {
    check(Fault::CrashBefore);
}

#[test]
fn crash_after_request() {
    check(Fault::CrashAfter);
}

/// What passes is not the client's business: with the first try of every request failing in one of these ways, the lake
/// opens and the first push is acknowledged.
#[test]
fn faults_that_pass_are_not_seen() {
    for fault in [Fault::Before, Fault::After, Fault::Slow, Fault::Stuck, Fault::Reset] {
        let _at = At(format!("{fault:?}"));
        let object = Objects::new(21).object(&[]);
        let mut world = World::new(21);
        let mut model = Model::default();
        model.trying(&object);
        let plan = Plan::First("", "", fault);
        let life = world.life(plan, StateDir::Empty, async |actor: Actor| {
            let published = actor.push(&object).await?;
            let read = actor.read(&object.path.hash).await?.expect("just pushed");
            assert!(read.1 == object.nar);
            actor.lake.close().await?;
            Ok::<_, narlake_storage::Error>(published)
        });
        let done = life.result.and_then(|pushed| pushed).unwrap_or_else(|e| panic!("{fault:?}: {}", e.chain()));
        model.acknowledged(&object.path.hash, done.record.info().nar_hash);
        world.check(&model);
    }
}
