//! The pool on musl's own allocator: what `speed` measures on the one that the program has.
#![expect(clippy::expect_used, reason = "a bench may stop at the first surprise")]

#[path = "../speed/pool.rs"]
mod pool;

use criterion::{Criterion, criterion_group, criterion_main};

fn pool_on_musl(criterion: &mut Criterion) {
    pool::measure(criterion, "pool-musl");
}

criterion_group!(benches, pool_on_musl);
criterion_main!(benches);
