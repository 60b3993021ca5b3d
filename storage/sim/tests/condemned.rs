//! Rule 4: *a push relies on packs that are condemned before it is published, and deleted after.* With a fault at its
//! first request to the bucket, at its second, and so on; for each kind of fault.

use narlake_format::id::Ulid;
use narlake_format::lake::location::PackRef;
use narlake_format::lake::{condemned, keys};
use narlake_sim::{Actor, At, Damage, Fault, Model, Objects, Plan, StateDir, World};
use narlake_storage::{Error, Published};

/// Sends the NAR, sees its packs condemned, and sends the narinfo.
async fn push(actor: &Actor, object: &narlake_sim::Object, batch: u64) -> Result<(Vec<PackRef>, Published), Error> {
    let sent = actor.send(object).await?;
    let key = format!("{}{}", keys::CONDEMNED, Ulid::from(u128::from(batch)));
    actor.store.set(&key, condemned::encode(&sent.packs)).await;
    actor.publish(object).await.map(|published| (sent.packs, published))
}

fn check(fault: Fault) {
    let mut objects = Objects::new(12);
    let object = objects.object(&[]);
    for number in 0.. {
        let mut world = World::new(number);
        let mut model = Model::default();
        model.trying(&object);
        let plan = Plan::At(number, fault);
        let life = world.life(plan, StateDir::Empty, async |actor: Actor| push(&actor, &object, 1).await);
        let Some(request) = usize::try_from(number).ok().and_then(|number| life.trace.get(number)) else { break };
        let at = format!("{fault:?} at request {number}, {}", request.name);
        let _at = At(at.clone());
        let (packs, published) = match life.result.and_then(|pushed| pushed) {
            Ok(done) => done,
            // What did not come up, or died, is followed by one that does not. Faults that pass are nobody's business:
            // the client is not turned away.
            Err(error) => {
                let passing = matches!(fault, Fault::Before | Fault::After | Fault::Slow | Fault::Stuck | Fault::Reset);
                assert!(!passing, "{at}: {}", error.chain());
                let life = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| push(&actor, &object, 2).await);
                life.result.and_then(|pushed| pushed).unwrap_or_else(|e| panic!("{at}: {}", e.chain()))
            }
        };
        model.acknowledged(&object.path.hash, published.record.info().nar_hash);
        world.check(&model);
        for pack in &packs {
            world.damage(&keys::pack(pack), Damage::Deleted);
        }
        world.check(&model);
    }
}

#[test]
fn at_every_request() {
    for fault in Fault::ALL {
        check(fault);
    }
}
