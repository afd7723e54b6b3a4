//! Network namespaces of a test: made, entered, gone.

use std::{fs::File, path::PathBuf, process::Command, sync::Arc, thread};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// A named network namespace; gone when the last handle is dropped, and replaced if an earlier run
/// left it.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(Arc<Mounted>);

#[derive(Debug)]
struct Mounted {
    path: PathBuf,
    file: File,
}

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces: run it as root"
        );
        std::fs::create_dir_all("/run/netns").unwrap();
        let path = PathBuf::from("/run/netns").join(name);
        discard(&path);
        File::create(&path).unwrap();
        let target = path.clone();
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let none = None::<&str>;
            mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                none,
                MsFlags::MS_BIND,
                none,
            )
            .unwrap();
        };
        thread::spawn(make).join().unwrap();
        let file = File::open(&path).unwrap();
        let namespace = Self(Arc::new(Mounted { path, file }));
        namespace.sh("ip link set lo up");
        namespace
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path.clone()
    }

    pub(crate) fn enter(&self) {
        setns(&self.0.file, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// Runs `work` on a thread inside; what it opens stays inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.run(|| {
            Command::new("/bin/sh")
                .args(["-ec", script])
                .output()
                .unwrap()
        });
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{script}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        discard(&self.path);
    }
}

fn discard(path: &PathBuf) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = std::fs::remove_file(path);
}
