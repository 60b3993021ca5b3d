//! Lives full of random faults: pushes one after the other and at once, of equal and of differing content, reads in
//! between, crashes at any request, reopening with the local state that was left, an old one, or none.

use std::time::Duration;

use narlake_sim::{Actor, Model, Object, Objects, Plan, Rng, StateDir, World, for_each_seed};
use narlake_storage::{Error, Published};

/// Lives of one world.
const LIVES: usize = 4;
/// What happens in one life, if it is not cut short.
const STEPS: usize = 6;

struct Run {
    rng: Rng,
    objects: Objects,
    model: Model,
    made: Vec<Object>,
}

impl Run {
    fn note(&mut self, object: &Object, pushed: Result<Published, Error>) {
        if let Ok(published) = pushed {
            self.model.acknowledged(&object.path.hash, published.record.info().nar_hash);
        }
    }

    /// A path that refers to some of those acknowledged, or one that was tried before.
    fn object(&mut self) -> Object {
        if !self.made.is_empty() && self.rng.per_mille(300) {
            return self.rng.pick(&self.made).clone();
        }
        let there = self.model.all_acknowledged();
        let object = self.objects.object(&there);
        self.made.push(object.clone());
        object
    }

    async fn step(&mut self, actor: &Actor) {
        match self.rng.below(6) {
            0 | 1 => {
                let object = self.object();
                self.model.trying(&object);
                let pushed = actor.push_until_done(&object).await;
                self.note(&object, pushed);
            }
            // Two at once: of two paths that share files, of one path with equal content, of one with differing.
            2 | 3 => {
                let one = self.object();
                let other = match self.rng.below(3) {
                    0 => one.clone(),
                    1 => self.objects.other_build(&one),
                    _ => self.object(),
                };
                self.model.trying(&one);
                self.model.trying(&other);
                let (first, second) = tokio::join!(actor.push_until_done(&one), actor.push_until_done(&other));
                self.note(&one, first);
                self.note(&other, second);
            }
            4 if !self.made.is_empty() => {
                let object = self.rng.pick(&self.made).clone();
                actor.read_and_compare(&self.model, &object.path.hash).await;
            }
            // A push that stops half way, or after its NAR.
            _ => {
                let object = self.object();
                self.model.trying(&object);
                if self.rng.per_mille(500) {
                    let _ = actor.send(&object).await;
                } else {
                    let half = bytes::Bytes::copy_from_slice(&object.nar[..object.nar.len() / 2]);
                    let broken = futures::stream::iter([Ok(half), Err(std::io::Error::other("the client is gone"))]);
                    assert!(actor.lake.ingest(&actor.cache, broken).await.is_err());
                }
            }
        }
    }
}

#[test]
fn random_lives() {
    for_each_seed("random_lives", 10, |seed| {
        let mut world = World::new(seed);
        let mut run = Run {
            rng: Rng::part(seed, "steps"),
            objects: Objects::new(seed),
            model: Model::default(),
            made: Vec::new(),
        };
        for _ in 0..LIVES {
            let crash_at = run.rng.per_mille(600).then(|| 20 + run.rng.next() % 150);
            let plan = Plan::Random { seed: run.rng.next(), per_mille: 10 + run.rng.next() % 60, crash_at };
            let state = *run.rng.pick(&[StateDir::Kept, StateDir::Kept, StateDir::Stale, StateDir::Empty]);
            if run.rng.per_mille(400) {
                world.snapshot_state();
            }
            let close = run.rng.per_mille(300);
            world.life(plan, state, async |actor: Actor| {
                for _ in 0..STEPS {
                    run.step(&actor).await;
                }
                if close {
                    let _ = actor.lake.close().await;
                }
            });
            world.clock.advance(Duration::from_millis(run.rng.next() % 5_000));
            world.check(&run.model);
        }
        // With the faults gone, whoever still wants something gets it.
        let made = std::mem::take(&mut run.made);
        let calm = world.life(Plan::Calm, StateDir::Kept, async |actor: Actor| {
            for object in &made {
                if object.references.iter().any(|r| *r != object.path && !run.model.is_acknowledged(&r.hash)) {
                    continue;
                }
                let pushed = actor.push(object).await;
                let published = pushed.unwrap_or_else(|e| panic!("{} in calm: {}", object.path, e.chain()));
                run.model.acknowledged(&object.path.hash, published.record.info().nar_hash);
            }
        });
        calm.result.unwrap_or_else(|e| panic!("the lake does not open: {}", e.chain()));
        world.check(&run.model);
        let served = run.model.paths().count();
        assert!(served > 0, "a run that did nothing proves nothing");
    });
}
