//! The agent's sockets are whose they should be. Giving one away needs root.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

use std::{fs, os::unix::fs::MetadataExt};

use turnpike_agent::sockets::{Access, bind};

#[tokio::test]
async fn a_socket_left_behind_is_replaced_and_modes_are_set() {
    assert!(
        nix::unistd::Uid::effective().is_root(),
        "run this test as root: it gives a socket away"
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/a.sock");
    drop(bind(&path, Access::RootOnly).unwrap());
    let _second = bind(&path, Access::RootOnly).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let feed = folder.path().join("feed.sock");
    let _feed = bind(&feed, Access::GroupOf(1338)).unwrap();
    let meta = fs::metadata(&feed).unwrap();
    assert_eq!((meta.mode() & 0o777, meta.gid()), (0o660, 1338));
}
