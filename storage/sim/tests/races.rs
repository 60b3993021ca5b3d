//! Two who act at once, with the order of their requests fixed by making one of them late.

use std::time::Duration;

use narlake_sim::{Actor, Fault, Model, Object, Objects, Plan, Request, StateDir, World};
use narlake_storage::{ErrorKind, Outcome};

/// Waits until a request has been sent whose name starts with the one text and has the other in it.
async fn sent(actor: &Actor, start: &str, part: &str) {
    let wanted = |request: &Request| request.name.starts_with(start) && request.name.contains(part);
    let start = tokio::time::Instant::now();
    while !actor.store.trace().iter().any(wanted) {
        assert!(start.elapsed() < Duration::from_secs(600), "no such request");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Rule 1: *A and B push; B hits a chunk that is only in A's pack, which is on its way; B is acknowledged; the server
/// dies before A's pack arrives.*
#[test]
fn a_hit_on_a_pack_in_flight_waits_for_it() {
    for seed in 0..5 {
        let mut objects = Objects::new(seed);
        let first = objects.object(&[]);
        let second = Object { path: objects.object(&[]).path, references: Vec::new(), ..first.clone() };
        let mut world = World::new(seed);
        let mut model = Model::default();
        model.trying(&first);
        model.trying(&second);
        let plan = Plan::First("put packs/", "", Fault::Slow);
        let life = world.life(plan, StateDir::Empty, async |actor: Actor| {
            tokio::join!(actor.push(&first), async {
                sent(&actor, "put packs/", "").await;
                let pushed = actor.push_again(&second).await;
                // The server dies the moment that B has its answer.
                actor.store.crash();
                pushed
            })
        });
        let (first_pushed, second_pushed) = life.result.expect("opens");
        if let Ok(published) = first_pushed {
            model.acknowledged(&first.path.hash, published.record.info().nar_hash);
        }
        let published = second_pushed.expect("B is acknowledged once A's pack is there");
        model.acknowledged(&second.path.hash, published.record.info().nar_hash);
        world.check(&model);
    }
}

/// Rule 1, the other ending: A's pack never arrives, so B, who relied on it, is not acknowledged.
#[test]
fn a_hit_on_a_pack_that_is_never_written_is_no_success() {
    let mut objects = Objects::new(3);
    let first = objects.object(&[]);
    let second = Object { path: objects.object(&[]).path, references: Vec::new(), ..first.clone() };
    let mut world = World::new(3);
    let mut model = Model::default();
    model.trying(&first);
    model.trying(&second);
    let plan = Plan::First("put packs/", "", Fault::CrashBefore);
    let life = world
        .life(plan, StateDir::Empty, async |actor: Actor| tokio::join!(actor.push(&first), actor.push_again(&second)));
    let (first_pushed, second_pushed) = life.result.expect("opens");
    assert!(first_pushed.is_err() && second_pushed.is_err());
    world.check(&model);
}

/// Rule 3: *two builders of one path with different content, on two servers.* Whichever record arrives first, and
/// whichever id is the older, what one of them was told is served stays served.
#[test]
fn the_first_of_two_servers_wins() {
    for seed in 0..20 {
        let mut objects = Objects::new(seed);
        let one = objects.object(&[]);
        let other = objects.other_build(&one);
        let mut world = World::new(seed);
        let mut model = Model::default();
        model.trying(&one);
        model.trying(&other);
        let clock = std::sync::Arc::clone(&world.clock);
        let plan = Plan::First("put caches/", "/paths/", Fault::Slow);
        let pushed = world.two_servers(plan, async |late, prompt| {
            tokio::join!(late.push(&one), async {
                sent(&late, "put caches/", "/paths/").await;
                // On even seeds the late one's id is the older, on odd ones chance decides.
                if seed % 2 == 0 {
                    clock.advance(Duration::from_millis(5));
                }
                prompt.push(&other).await
            })
        });
        let (late, prompt) = pushed.expect("both open");
        let prompt = prompt.expect("pushes");
        assert_eq!(prompt.outcome, Outcome::New);
        model.acknowledged(&other.path.hash, prompt.record.info().nar_hash);
        let late = late.expect("a build that is not reproducible is no failure");
        assert_eq!(late.outcome, Outcome::NotReproducible, "seed {seed}");
        model.acknowledged(&one.path.hash, late.record.info().nar_hash);
        world.check(&model);
    }
}

/// Two pushes of one path at once on one server: one content, both told so.
#[test]
fn two_pushes_of_one_path() {
    for seed in 0..5 {
        let mut objects = Objects::new(seed);
        let one = objects.object(&[]);
        let other = objects.other_build(&one);
        let mut world = World::new(seed);
        let mut model = Model::default();
        model.trying(&one);
        model.trying(&other);
        let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
            let (a, b, c) = tokio::join!(actor.push(&one), actor.push(&other), actor.push(&one));
            for pushed in [a, b, c] {
                let published = pushed.expect("pushes");
                model.acknowledged(&one.path.hash, published.record.info().nar_hash);
                assert!(actor.read_and_compare(&model, &one.path.hash).await);
            }
        });
        life.result.expect("opens");
        world.check(&model);
    }
}

/// Rule 6 and a check that fails for want of an answer: *A's record is written; A cannot read its references; B pushes
/// the same path, sees A's record and is acknowledged; A takes its record back.*
#[test]
fn a_record_that_others_may_rely_on_is_not_taken_back() {
    let mut objects = Objects::new(9);
    let below = objects.object(&[]);
    let above = Object { references: vec![below.path.clone()], ..objects.object(&[]) };
    let mut world = World::new(9);
    let mut model = Model::default();
    for object in [&below, &above] {
        model.trying(object);
    }
    let life = world.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
        let published = actor.push(&below).await.expect("pushes");
        model.acknowledged(&below.path.hash, published.record.info().nar_hash);
    });
    life.result.expect("opens");
    // Listing what is condemned is what a commit does after its record is written.
    let plan = Plan::Always("list condemned", Fault::Before);
    let life = world.life(plan, StateDir::Kept, async |actor: Actor| actor.push(&above).await);
    let error = life.result.expect("opens").expect_err("no answer, no success");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let life = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| {
        assert!(actor.read_and_compare(&model, &above.path.hash).await, "the record was taken back");
    });
    life.result.expect("opens");
    world.check(&model);
}
