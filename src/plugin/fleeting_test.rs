//! The phases of a group: what comes before, beside and after its Init.

use std::time::Duration;

use serde_json::json;
use tonic::Code;

use super::super::parent::tests::{executable, that_hangs};
use super::*;

fn waiting() -> Fleeting {
    Fleeting::new(None)
}

fn request(config: &serde_json::Value) -> Request<InitRequest> {
    Request::new(InitRequest {
        config: config.to_string().into_bytes(),
        settings: None,
    })
}

fn fake() -> serde_json::Value {
    json!({ "vm_image": "/proc/self/exe", "vmm": "fake", "vm_subnet": "10.0.0.0/29" })
}

async fn increase(group: &Fleeting) -> Result<u32, Code> {
    let answer = group.increase(Request::new(IncreaseRequest { n: 1 })).await;
    answer
        .map(|answer| answer.into_inner().succeeded)
        .map_err(|status| status.code())
}

#[tokio::test]
async fn a_failed_init_leaves_room_for_another_and_a_good_one_for_none() {
    let group = waiting();
    assert_eq!(increase(&group).await, Err(Code::FailedPrecondition));
    let bad = group.init(request(&json!({ "x": 1 }))).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let answer = group.init(request(&fake())).await.unwrap().into_inner();
    assert_eq!(answer.max_size, 1);
    assert_eq!(increase(&group).await, Ok(1));
    let again = group.init(request(&fake())).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    assert_eq!(increase(&group).await, Ok(0));
}

#[tokio::test]
async fn after_the_end_nothing_is_accepted_and_another_end_is_none() {
    for init in [true, false] {
        let group = waiting();
        if init {
            group.init(request(&fake())).await.unwrap();
        }
        group.shutdown(Request::new(Empty {})).await.unwrap();
        group.shutdown(Request::new(Empty {})).await.unwrap();
        group.close().await;
        assert_eq!(increase(&group).await, Err(Code::FailedPrecondition));
        let late = group.init(request(&fake())).await.unwrap_err();
        assert_eq!(late.code(), Code::FailedPrecondition);
    }
}

/// Polls an Init until it waits for a parent's executable that never answers.
async fn until_it_waits(init: &mut (impl Future + Unpin)) {
    let waited = tokio::time::timeout(Duration::from_millis(100), init).await;
    assert!(waited.is_err(), "the init did not wait");
}

fn with_a_parent_that_hangs(dir: &tempfile::TempDir) -> Fleeting {
    let path = executable(dir.path(), &that_hangs());
    Fleeting::new(Some(path))
}

#[tokio::test]
async fn an_init_that_its_caller_gives_up_leaves_room_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let group = with_a_parent_that_hangs(&dir);
    let mut first = group.init(request(&fake()));
    until_it_waits(&mut first).await;
    let beside = group.init(request(&fake())).await.unwrap_err();
    assert_eq!(beside.code(), Code::AlreadyExists);
    drop(first);
    let mut config = fake();
    config["vm_runner_binary"] = json!("/proc/self/exe");
    group.init(request(&config)).await.unwrap();
}

#[tokio::test]
async fn an_end_during_init_is_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let group = with_a_parent_that_hangs(&dir);
    let mut init = group.init(request(&fake()));
    until_it_waits(&mut init).await;
    group.close().await;
    let status = init.await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(increase(&group).await, Err(Code::FailedPrecondition));
}
