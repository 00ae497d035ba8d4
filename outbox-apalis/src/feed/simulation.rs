//! Bad days, thousands of them a second: workers around the model of a store, with a clock that the simulation moves, and
//! faults from a seed. After every step the promises are checked. Whatever fails says how to repeat it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

mod effects;
mod plan;
mod process;
mod world;

use plan::Plan;
use world::World;

/// Runs one seed; says so if it fails.
fn run(seed: u64) {
    let simulated = catch_unwind(AssertUnwindSafe(|| World::new(Plan::random(seed)).run()));
    if let Err(panic) = simulated {
        eprintln!("repeat: OUTBOX_SEED={seed} cargo test -p outbox-apalis --lib simulation -- --nocapture");
        resume_unwind(panic);
    }
}

#[test]
fn whatever_happens_the_promises_are_kept() {
    if let Some(seed) = std::env::var("OUTBOX_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return run(seed);
    }
    let is_long = std::env::var_os("OUTBOX_LONG_TESTS").is_some_and(|value| value == "1");
    let asked = std::env::var("OUTBOX_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    let seeds = asked.unwrap_or(if is_long { 1_000_000 } else { 2_400 });
    let began = std::time::Instant::now();
    (0..seeds).for_each(run);
    println!("{seeds} seeds, {:.0} a second", f64::from(seeds as u32) / began.elapsed().as_secs_f64());
}
