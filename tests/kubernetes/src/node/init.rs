//! What runs on a node: first a process that makes namespaces, then inside them the first process
//! of the machine, which lays out its files, starts its services, and reaps.
//!
//! The machine's root is new: its own `/etc`, `/opt`, `/var`, `/run` and `/tmp`, the programs of the
//! machine below it read-only, nothing else. So two nodes share nothing but the kernel, and when
//! the first process ends, all of it is gone.

use std::{
    fs,
    os::unix::{fs::symlink, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        wait::{WaitStatus, wait},
    },
    unistd::{chdir, pivot_root},
};
use serde::{Deserialize, Serialize};

pub(super) const PATH: &str =
    "/opt/box/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where Kubernetes' programs and the images' archives appear on the node.
const PROGRAMS: &str = "opt/box/bin";
const IMAGES: &str = "opt/box/images";
const SOCKET: &str = "/run/containerd/containerd.sock";
const NOTHING: Option<&str> = None;

/// A machine to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    pub name: String,
    /// Its `/etc`, `/opt`, `/var` and `/root`.
    pub disk: PathBuf,
    /// An empty folder for its root.
    pub root: PathBuf,
    pub programs: PathBuf,
    pub images: Vec<PathBuf>,
    pub services: Vec<Service>,
}

/// A program that is started again when it ends, as systemd would.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub arguments: Vec<String>,
}

/// The outer process: makes the namespaces, starts the first process, and lasts as long as it. When
/// this one is killed, the kernel kills that one.
pub fn outer(file: &Path) -> Result<()> {
    let new = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    unshare(new).context("new namespaces")?;
    let status = Command::new(std::env::current_exe()?)
        .arg("init")
        .arg(file)
        .stdin(Stdio::null())
        .status()?;
    bail!("the first process ended: {status}")
}

/// The first process of the machine.
pub fn init(file: &Path) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    ensure!(
        std::process::id() == 1,
        "this is for the first process of a new machine"
    );
    let machine: Machine = serde_json::from_slice(&fs::read(file)?)?;
    let Machine {
        name,
        disk,
        root,
        programs,
        images,
        services,
    } = &machine;
    fs::write("/proc/sys/kernel/hostname", name)?;
    lay_out(root, disk, programs, images).context("laying out the root")?;
    enter(root).context("entering the root")?;
    own_kernel_settings().context("kernel settings")?;
    serve(services)
}

fn lay_out(root: &Path, disk: &Path, programs: &Path, images: &[PathBuf]) -> Result<()> {
    // Nothing that is mounted here shows outside, and nothing of outside comes in.
    mount(
        NOTHING,
        "/",
        NOTHING,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        NOTHING,
    )?;
    tmpfs(root, "mode=755")?;
    for name in ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let (from, to) = (Path::new("/").join(name), root.join(name));
        match fs::symlink_metadata(&from) {
            Ok(about) if about.is_symlink() => symlink(fs::read_link(&from)?, &to)?,
            Ok(_) => bind(&from, &to, true)?,
            Err(_) => {}
        }
    }
    for name in ["etc", "opt", "var", "root"] {
        bind(&disk.join(name), &root.join(name), false)?;
    }
    if fs::exists("/etc/alternatives")? {
        bind(
            "/etc/alternatives".as_ref(),
            &root.join("etc/alternatives"),
            true,
        )?;
    }
    bind(programs, &root.join(PROGRAMS), true)?;
    fs::create_dir_all(root.join(IMAGES))?;
    for image in images {
        let name = image.file_name().context("an image has a name")?;
        bind(image, &root.join(IMAGES).join(name), true)?;
    }
    for (name, options) in [("run", "mode=755"), ("tmp", "mode=1777")] {
        fs::create_dir_all(root.join(name))?;
        tmpfs(&root.join(name), options)?;
    }
    fs::create_dir_all(root.join("run/lock"))?;
    fs::create_dir_all(root.join("run/netns"))?;
    for (link, to) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        if !root.join(link).is_symlink() {
            symlink(to, root.join(link))?;
        }
    }
    bind("/dev".as_ref(), &root.join("dev"), false)?;
    tmpfs(&root.join("dev/shm"), "mode=1777")?;
    kernel_folder("proc", &root.join("proc"))?;
    kernel_folder("sysfs", &root.join("sys"))?;
    // sysfs is this network namespace's; the groups are the machine's.
    bind(
        "/sys/fs/cgroup".as_ref(),
        &root.join("sys/fs/cgroup"),
        false,
    )
}

/// Makes the root ours; from here on, nothing of the old one is reached.
fn enter(root: &Path) -> Result<()> {
    chdir(root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    // A kubelet's volumes may pass mounts to and fro.
    Ok(mount(
        NOTHING,
        "/",
        NOTHING,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        NOTHING,
    )?)
}

/// A kubelet insists on writing these, which are the whole machine's: it gets files that already
/// say what it wants.
fn own_kernel_settings() -> Result<()> {
    fs::create_dir_all("/run/settings")?;
    for (name, value) in [
        ("vm/overcommit_memory", "1"),
        ("vm/panic_on_oom", "0"),
        ("kernel/panic", "10"),
        ("kernel/panic_on_oops", "1"),
        ("kernel/keys/root_maxkeys", "1000000"),
        ("kernel/keys/root_maxbytes", "25000000"),
    ] {
        let file = Path::new("/run/settings").join(name.replace('/', "-"));
        fs::write(&file, format!("{value}\n"))?;
        let setting = Path::new("/proc/sys").join(name);
        if setting.exists() {
            mount(Some(&file), &setting, NOTHING, MsFlags::MS_BIND, NOTHING)?;
        }
    }
    Ok(())
}

fn serve(services: &[Service]) -> Result<()> {
    let (runtime, rest) = services.split_first().context("there are services")?;
    let mut running = vec![(runtime, start(runtime)?)];
    import()?;
    for service in rest {
        running.push((service, start(service)?));
    }
    loop {
        let ended = match wait() {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid.as_raw(),
            Ok(_) => continue,
            Err(error) => bail!("waiting for processes: {error}"),
        };
        // Orphans of containers end here too.
        for (service, child) in &mut running {
            if i32::try_from(child.id()) == Ok(ended) {
                eprintln!("{} ended and is started again", service.name);
                thread::sleep(Duration::from_secs(1));
                *child = start(service)?;
            }
        }
    }
}

fn start(service: &Service) -> Result<Child> {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(format!("/var/log/{}.log", service.name))?;
    let mut command = Command::new(&service.name);
    command
        .args(&service.arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    command.spawn().with_context(|| service.name.clone())
}

/// Gives containerd the images that it does not have yet.
fn import() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ctr(&["version"])? {
        ensure!(
            Instant::now() < deadline,
            "containerd does not answer; see /var/log/containerd.log"
        );
        thread::sleep(Duration::from_millis(50));
    }
    let done = Path::new("/var/lib/containerd/imported");
    fs::create_dir_all(done)?;
    for entry in fs::read_dir(Path::new("/").join(IMAGES))? {
        let entry = entry?;
        let mark = done.join(entry.file_name());
        if !mark.exists() {
            let path = entry.path();
            let imported = ctr(&["-n", "k8s.io", "images", "import", &path.to_string_lossy()])?;
            ensure!(imported, "{} was not imported", path.display());
            fs::write(mark, "")?;
        }
    }
    Ok(())
}

fn ctr(arguments: &[&str]) -> Result<bool> {
    let output = Command::new("ctr")
        .args(["--address", SOCKET])
        .args(arguments)
        .env("PATH", PATH)
        .output()
        .context("ctr, of the package containerd")?;
    if !output.status.success() && arguments.len() > 1 {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.status.success())
}

fn tmpfs(target: &Path, options: &str) -> Result<()> {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(options),
    )
    .with_context(|| target.display().to_string())
}

fn kernel_folder(kind: &str, target: &Path) -> Result<()> {
    fs::create_dir_all(target)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(kind), target, Some(kind), flags, NOTHING)
        .with_context(|| target.display().to_string())
}

/// A file or folder appears at `to`, which is made.
fn bind(from: &Path, to: &Path, read_only: bool) -> Result<()> {
    let bound = || -> Result<()> {
        if from.is_dir() {
            fs::create_dir_all(to)?;
        } else {
            fs::write(to, "")?;
        }
        mount(
            Some(from),
            to,
            NOTHING,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            NOTHING,
        )?;
        if read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NOTHING, to, NOTHING, flags, NOTHING)?;
        }
        Ok(())
    };
    bound().with_context(|| format!("{} at {}", from.display(), to.display()))
}
