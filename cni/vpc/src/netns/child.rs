//! The only unsafe code: what happens between `fork` and `exec`, and one ioctl.
//!
//! After `fork` in a process of many threads only async-signal-safe calls are allowed: no
//! allocation, no locks. So [`Plan::new`] works everything out in the parent (paths as C strings,
//! which directories to make, descriptors opened), and [`enter`] only makes system calls.
#![expect(
    unsafe_code,
    reason = "pre_exec and system calls that nix does not wrap"
)]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
};

use super::{Command, Error, Namespace, command::Mount, system};

/// Everything the child does before `exec`, ready to be done without allocating.
#[derive(Debug)]
pub(super) struct Plan {
    namespace: OwnedFd,
    parent: i32,
    private_mounts: bool,
    binds: Vec<Bind>,
    steps: Vec<Step>,
    cwd: Option<CString>,
    user: Option<(u32, u32)>,
    new_session: bool,
    die_with_parent: bool,
    no_new_privileges: bool,
    capabilities: Option<u64>,
}

/// A source taken hold of before any mount covers it; `tree` is filled in by the child.
#[derive(Debug)]
struct Bind {
    source: CString,
    read_only: bool,
    tree: libc::c_int,
}

#[derive(Debug)]
enum Step {
    Directory(CString),
    File(CString),
    Tmpfs(CString),
    /// Index into `binds`.
    Attach(usize, CString),
}

impl Plan {
    pub(super) fn new(command: &Command, namespace: &Namespace) -> Result<Self, Error> {
        let (binds, steps) = mount_steps(&command.mounts)?;
        Ok(Self {
            namespace: namespace.fd()?,
            parent: nix::unistd::getpid().as_raw(),
            private_mounts: !command.mounts.is_empty(),
            binds,
            steps,
            cwd: command.cwd.as_deref().map(c_string).transpose()?,
            user: command.user,
            new_session: command.new_session,
            die_with_parent: command.die_with_parent,
            no_new_privileges: command.no_new_privileges,
            capabilities: command.capabilities,
        })
    }
}

/// Has `command` carry out `plan` in the child.
pub(super) fn install(command: &mut std::process::Command, mut plan: Plan) {
    // SAFETY: `enter` makes system calls only; it neither allocates nor takes a lock, and all it
    // touches was made before the fork and belongs to this closure.
    unsafe { command.pre_exec(move || enter(&mut plan)) };
}

fn mount_steps(mounts: &[Mount]) -> Result<(Vec<Bind>, Vec<Step>), Error> {
    let (mut binds, mut steps) = (Vec::new(), Vec::new());
    // Tmpfs targets, and what was made below them so far.
    let (mut fresh, mut made) = (Vec::<PathBuf>::new(), Vec::<PathBuf>::new());
    for mount in mounts {
        match mount {
            Mount::Tmpfs { target } => {
                let target = place(target, true, &fresh, &mut made, &mut steps)?;
                steps.push(Step::Tmpfs(c_string(&target)?));
                made.retain(|path| !path.starts_with(&target));
                fresh.push(target);
            }
            Mount::Bind {
                source,
                target,
                read_only,
            } => {
                let source = source
                    .canonicalize()
                    .map_err(system(format!("finding {} to mount", source.display())))?;
                let target = place(target, source.is_dir(), &fresh, &mut made, &mut steps)?;
                let bind = Bind {
                    source: c_string(&source)?,
                    read_only: *read_only,
                    tree: -1,
                };
                steps.push(Step::Attach(binds.len(), c_string(&target)?));
                binds.push(bind);
            }
        }
    }
    Ok((binds, steps))
}

/// The target with its symbolic links resolved; below a tmpfs, the steps that make it.
fn place(
    target: &Path,
    directory: bool,
    fresh: &[PathBuf],
    made: &mut Vec<PathBuf>,
    steps: &mut Vec<Step>,
) -> Result<PathBuf, Error> {
    let missing = || Error::MountPoint(target.into());
    let known = target
        .ancestors()
        .find_map(|path| Some((path, path.canonicalize().ok()?)));
    let (known, real) = known.ok_or_else(missing)?;
    let rest = target.strip_prefix(known).map_err(|_| missing())?;
    let resolved = if rest.as_os_str().is_empty() {
        real
    } else {
        real.join(rest)
    };
    let Some(base) = fresh
        .iter()
        .rfind(|base| resolved.starts_with(base) && &resolved != *base)
    else {
        return if resolved.exists() {
            Ok(resolved)
        } else {
            Err(missing())
        };
    };
    let below: Vec<&Path> = resolved
        .ancestors()
        .take_while(|path| *path != base.as_path())
        .collect();
    for path in below.into_iter().rev() {
        if made.iter().any(|done| done == path) {
            continue;
        }
        let text = c_string(path)?;
        let last = path == resolved;
        steps.push(if last && !directory {
            Step::File(text)
        } else {
            Step::Directory(text)
        });
        made.push(path.into());
    }
    Ok(resolved)
}

fn c_string(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| system(format!("using the path {}", path.display()))(error))
}

fn enter(plan: &mut Plan) -> io::Result<()> {
    // SAFETY: setns, setsid and chdir take a valid descriptor, nothing, and a C string that the
    // plan owns.
    unsafe {
        check(libc::setns(plan.namespace.as_raw_fd(), libc::CLONE_NEWNET))?;
        if plan.new_session {
            check(libc::setsid())?;
        }
    }
    if plan.private_mounts {
        make_mounts(plan)?;
    }
    if let Some(cwd) = &plan.cwd {
        // SAFETY: a C string that the plan owns.
        check(unsafe { libc::chdir(cwd.as_ptr()) })?;
    }
    drop_privileges(plan)?;
    if plan.die_with_parent {
        // After the user changed: that clears the signal.
        // SAFETY: prctl and getppid touch no memory of ours.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if libc::getppid() != plan.parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
    }
    Ok(())
}

fn make_mounts(plan: &mut Plan) -> io::Result<()> {
    // SAFETY: all pointers are C strings owned by the plan or literals; descriptors are those that
    // open_tree gave. Slave, so that what is unmounted on the machine goes here too.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let slave = libc::MS_REC | libc::MS_SLAVE;
        check(libc::mount(
            std::ptr::null(),
            c"/".as_ptr(),
            std::ptr::null(),
            slave,
            std::ptr::null(),
        ))?;
        for bind in &mut plan.binds {
            bind.tree = take_tree(&bind.source, bind.read_only)?;
        }
        for step in &plan.steps {
            match step {
                Step::Directory(path) => check(libc::mkdir(path.as_ptr(), 0o755))?,
                Step::File(path) => {
                    let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC;
                    let file = check(libc::open(path.as_ptr(), flags, 0o644))?;
                    check(libc::close(file))?
                }
                Step::Tmpfs(path) => {
                    let (kind, options) = (c"tmpfs".as_ptr(), c"mode=755,size=64m".as_ptr());
                    let flags = libc::MS_NOSUID | libc::MS_NODEV;
                    check(libc::mount(
                        kind,
                        path.as_ptr(),
                        kind,
                        flags,
                        options.cast(),
                    ))?
                }
                Step::Attach(index, path) => {
                    let Some(bind) = plan.binds.get(*index) else {
                        continue;
                    };
                    attach(bind.tree, path)?
                }
            };
        }
    }
    Ok(())
}

/// A detached copy of the mount at `source`.
fn take_tree(source: &CString, read_only: bool) -> io::Result<libc::c_int> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | RECURSIVE;
    // SAFETY: a C string and integers; the result is a descriptor that `exec` closes.
    let tree =
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    let tree = check(libc::c_int::try_from(tree).unwrap_or(-1))?;
    if read_only {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY,
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        };
        // SAFETY: `attributes` outlives the call and its size is passed with it.
        let set = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree,
                c"".as_ptr(),
                EMPTY_PATH | RECURSIVE,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        check(libc::c_int::try_from(set).unwrap_or(-1))?;
    }
    Ok(tree)
}

fn attach(tree: libc::c_int, target: &CString) -> io::Result<libc::c_int> {
    // SAFETY: C strings and integers.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(libc::c_int::try_from(moved).unwrap_or(-1))
}

fn drop_privileges(plan: &Plan) -> io::Result<()> {
    // SAFETY: integers only; setgroups is told that its list has no entries.
    unsafe {
        if let Some(bounding) = plan.capabilities {
            for capability in (0..64).filter(|bit| bounding & (1 << bit) == 0) {
                // EINVAL: beyond the last one the kernel knows.
                if libc::prctl(libc::PR_CAPBSET_READ, capability) == 1 {
                    check(libc::prctl(libc::PR_CAPBSET_DROP, capability))?;
                }
            }
        }
        if let Some((uid, gid)) = plan.user {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))?;
        }
        if plan.no_new_privileges {
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        }
    }
    Ok(())
}

/// `AT_RECURSIVE` and `AT_EMPTY_PATH` with the type that these calls take.
const RECURSIVE: libc::c_uint = 0x8000;
const EMPTY_PATH: libc::c_uint = 0x1000;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Brings `lo` up in the calling thread's namespace.
pub(super) fn raise_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is valid; it lives through both calls, which read its name and
    // write its flags.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_flags |= libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw mut request,
        ))?;
    }
    Ok(())
}
