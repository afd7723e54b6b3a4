//! What the gate gives to the user that it becomes, and what it leaves alone. It needs root.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

use turnpike_gate::privileges::give;

#[test]
fn only_what_is_plainly_the_records_changes_hands() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "run this test as root: it gives files away"
    );
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("spool");
    give(&dir, 1338).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    let roots = ["shadow", "passwd"].map(|name| folder.path().join(name));
    for path in &roots {
        fs::write(path, "root's").unwrap();
    }
    fs::write(dir.join("record.sqlite"), "").unwrap();
    symlink(&roots[0], dir.join("soft")).unwrap();
    fs::hard_link(&roots[1], dir.join("hard")).unwrap();
    give(&dir, 1338).unwrap();
    let owner = |path: &Path| fs::metadata(path).unwrap().uid();
    assert_eq!(
        (owner(&dir), owner(&dir.join("record.sqlite"))),
        (1338, 1338)
    );
    assert_eq!(
        roots.map(|path| owner(&path)),
        [0, 0],
        "root's files were given away"
    );
}
