//! The pool: instances and their lifecycle.

pub mod brain;
pub mod ids;
pub mod keys;
pub mod limits;
pub mod spec;
pub mod ssh;

pub use spec::{
    ConnectInfo, FixedCredential, InstanceId, InstanceState, Login, PoolError, PoolSpec, Shape,
    VmmKind,
};
