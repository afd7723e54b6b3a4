use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, raise},
};
use tempfile::TempDir;

use super::*;

/// Names the place where this process is to die.
const DIE_BEFORE: &str = "TURNPIKE_TEST_DIE_BEFORE";
const FOLDER: &str = "TURNPIKE_TEST_FOLDER";
const OLD: &str = "an older version";
const NEW: &str = "what this version says";

pub(super) fn step(place: &str) {
    if std::env::var(DIE_BEFORE).is_ok_and(|chosen| chosen == place) {
        raise(Signal::SIGKILL).unwrap();
    }
}

struct Host {
    _root: TempDir,
    installer: Installer,
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let folders = Folders {
            bin: root.path().join("bin"),
            conf: root.path().join("conf"),
        };
        fs::create_dir(&folders.bin).unwrap();
        fs::create_dir(&folders.conf).unwrap();
        // Known already, so that no executable is needed beside the test's.
        let plugin = folders.bin.join(PLUGIN);
        fs::write(&plugin, "executable").unwrap();
        let copied = Seen::at(&plugin);
        let socket = "/run/turnpike/cni.sock".into();
        Self {
            _root: root,
            installer: Installer {
                folders,
                socket,
                copied,
            },
        }
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.installer.folders.conf.join(name)
    }

    fn names(&self) -> Vec<String> {
        names(&self.installer.folders.conf)
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_configuration_comes_when_adds_can_be_served_and_not_before() {
    let mut host = Host::new();
    assert_eq!(host.installer.install(false), Standing::Pending);
    assert_eq!(host.names(), [""; 0]);
    assert_eq!(host.installer.install(true), Standing::Fine);
    assert_eq!(host.names(), [CONFLIST]);
    let text = fs::read_to_string(host.conf(CONFLIST)).unwrap();
    let read: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ours = json!({"type": "turnpike-cni", "agentSocket": "/run/turnpike/cni.sock"});
    assert_eq!(
        read,
        json!({"cniVersion": "1.0.0", "name": "turnpike", "plugins": [ours]})
    );
}

#[test]
fn what_stands_is_left_alone_and_what_was_changed_is_mended() {
    let mut host = Host::new();
    host.installer.install(true);
    let (path, first) = (host.conf(CONFLIST), Seen::at(&host.conf(CONFLIST)));
    host.installer.install(true);
    assert_eq!(Seen::at(&path), first, "not written again");
    let text = fs::read_to_string(&path).unwrap();
    let meddle: [&dyn Fn(); 4] = [
        &|| fs::remove_file(&path).unwrap(),
        &|| fs::write(&path, "{}").unwrap(),
        &|| fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap(),
        &|| {
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        },
    ];
    for meddle in meddle {
        meddle();
        assert_eq!(host.installer.install(true), Standing::Fine);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.is_file() && found.mode() & 0o777 == 0o644);
    }
    assert!(fs::read_to_string("/etc/passwd").unwrap().contains("root"));
}

#[test]
fn host_ports_are_made_where_there_is_a_plugin_for_them() {
    let mut host = Host::new();
    host.installer.install(true);
    assert!(
        !fs::read_to_string(host.conf(CONFLIST))
            .unwrap()
            .contains("portmap")
    );
    fs::write(host.installer.folders.bin.join(PORTMAP), "").unwrap();
    host.installer.install(true);
    let text = fs::read_to_string(host.conf(CONFLIST)).unwrap();
    let read: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        read["plugins"][1],
        json!({"type": "portmap", "capabilities": {"portMappings": true}})
    );
}

#[test]
fn another_cni_that_the_runtime_prefers_is_named() {
    let mut host = Host::new();
    for later in ["10-turnpike.conflist.bak", "20-other.conf", "00-readme.md"] {
        fs::write(host.conf(later), "").unwrap();
    }
    assert_eq!(host.installer.install(true), Standing::Fine);
    fs::write(host.conf("10-aws.conflist"), "").unwrap();
    let Standing::Hindered(why) = host.installer.install(true) else {
        panic!("10-aws.conflist wins")
    };
    assert!(
        why.contains("10-aws.conflist") && why.contains("Remove that CNI"),
        "{why}"
    );
    fs::remove_file(host.conf("10-aws.conflist")).unwrap();
    assert_eq!(host.installer.install(true), Standing::Fine);
}

#[test]
fn a_missing_original_is_told_by_its_path() {
    let mut host = Host::new();
    fs::remove_file(host.installer.folders.bin.join(PLUGIN)).unwrap();
    let Standing::Hindered(why) = host.installer.install(true) else {
        panic!("there is no executable beside the test's")
    };
    assert!(
        why.contains("bin/turnpike-cni cannot be written: its original"),
        "{why}"
    );
    assert_eq!(
        host.names(),
        [""; 0],
        "no configuration without an executable"
    );
}

/// Not by itself: the process that the next test starts and that dies.
#[test]
#[ignore = "run by killed_at_any_step_it_is_the_old_file_or_the_new_one"]
fn one_replacement() {
    let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
    replace(&folder.join("file"), NEW.as_bytes(), 0o755).unwrap();
}

fn replace_in_a_process(folder: &Path, die_before: &str) -> ExitStatus {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "install::tests::one_replacement"])
        .env(FOLDER, folder)
        .env(DIE_BEFORE, die_before)
        .output();
    output.unwrap().status
}

#[test]
fn killed_at_any_step_it_is_the_old_file_or_the_new_one() {
    let places = [
        ("written", OLD),
        ("written whole", OLD),
        ("executable", OLD),
        ("durable", OLD),
        ("renamed", OLD),
        ("synced", NEW),
    ];
    for (place, expected) in places {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, OLD).unwrap();
        let died = replace_in_a_process(folder.path(), place);
        assert_eq!(died.signal(), Some(Signal::SIGKILL as i32), "at `{place}`");
        assert_eq!(fs::read_to_string(&path).unwrap(), expected, "at `{place}`");
        assert!(replace_in_a_process(folder.path(), "").success());
        assert_eq!(fs::read_to_string(&path).unwrap(), NEW);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
        assert_eq!(names(folder.path()), ["file"], "after `{place}`");
    }
}

#[test]
fn a_full_disk_leaves_the_old_file_and_no_other() {
    let disk = Disk::new("size=16k");
    let path = disk.path().join("file");
    fs::write(&path, OLD).unwrap();
    let error = replace(&path, &[b'x'; 64 * 1024], 0o755).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(fs::read_to_string(&path).unwrap(), OLD);
    assert_eq!(names(disk.path()), ["file"]);
    replace(&path, NEW.as_bytes(), 0o755).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), NEW);
}

#[test]
fn a_read_only_folder_is_told_and_left() {
    let disk = Disk::new("size=64k");
    let path = disk.path().join("file");
    fs::write(&path, OLD).unwrap();
    disk.read_only();
    let error = replace(&path, NEW.as_bytes(), 0o755).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    replace(&path, OLD.as_bytes(), 0o644).expect("what is right already needs no writing");
}

/// A small disk of its own.
struct Disk(TempDir);

impl Disk {
    fn new(options: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test mounts a small disk: be root"
        );
        let folder = tempfile::tempdir().unwrap();
        mount(
            Some("tmpfs"),
            folder.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn read_only(&self) {
        let none = None::<&str>;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, self.path(), none, flags, none).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(self.path(), MntFlags::MNT_DETACH).unwrap();
    }
}
