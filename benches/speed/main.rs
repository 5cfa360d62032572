//! The program at this machine's own speed: the executable as a runner sees it, the pool, and the
//! overlay's map. No VM is started: the pool's VMM is the fake one.
#![expect(clippy::expect_used, reason = "a bench may stop at the first surprise")]

mod executable;
mod overlay;
mod pool;

use criterion::{Criterion, criterion_group, criterion_main};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn pool_on_mimalloc(criterion: &mut Criterion) {
    pool::measure(criterion, "pool-mimalloc");
}

// The pool first: nothing else has used the process's memory then.
criterion_group!(
    benches,
    pool_on_mimalloc,
    executable::measure,
    overlay::measure
);
criterion_main!(benches);
