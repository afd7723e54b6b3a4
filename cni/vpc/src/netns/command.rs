//! A process inside a namespace, as a container runtime would start it: its user, environment and
//! mounts are its own, the rest of the machine's files are shared.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{OnceLock, mpsc},
    thread,
};

use super::{Error, Namespace, child, system};

/// Where a process's stdout or stderr goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Output {
    #[default]
    Inherit,
    Null,
    /// Handed to the caller with the child.
    Piped,
    /// Appended to; created where absent.
    File(PathBuf),
}

/// What to start in a namespace. Mounts are made in the order given, in a mount namespace that
/// ends with the process; without any, the process shares the machine's.
#[derive(Clone, Debug)]
pub struct Command {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    env_clear: bool,
    stdin: Stdin,
    stdout: Output,
    stderr: Output,
    pub(super) cwd: Option<PathBuf>,
    pub(super) user: Option<(u32, u32)>,
    pub(super) mounts: Vec<Mount>,
    pub(super) new_session: bool,
    pub(super) die_with_parent: bool,
    pub(super) no_new_privileges: bool,
    pub(super) capabilities: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Stdin {
    Null,
    Piped,
}

#[derive(Clone, Debug)]
pub(super) enum Mount {
    Bind {
        source: PathBuf,
        target: PathBuf,
        read_only: bool,
    },
    Tmpfs {
        target: PathBuf,
    },
}

impl Command {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().into(),
            args: Vec::new(),
            env: Vec::new(),
            env_clear: false,
            stdin: Stdin::Null,
            stdout: Output::Inherit,
            stderr: Output::Inherit,
            cwd: None,
            user: None,
            mounts: Vec::new(),
            new_session: false,
            die_with_parent: false,
            no_new_privileges: false,
            capabilities: None,
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Nothing of this process's environment is passed on.
    pub fn env_clear(mut self) -> Self {
        self.env_clear = true;
        self
    }

    /// As seen inside the process's own mounts.
    pub fn cwd(mut self, path: impl Into<PathBuf>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Runs as this user and group, without supplementary groups.
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// Only these capabilities can ever be had (bits by number, as in `CapBnd`).
    pub fn capabilities(mut self, bounding: u64) -> Self {
        self.capabilities = Some(bounding);
        self
    }

    /// Set-uid files and file capabilities give nothing.
    pub fn no_new_privileges(mut self) -> Self {
        self.no_new_privileges = true;
        self
    }

    /// `source` (file or directory) appears at `target`. The target must exist, except below a
    /// [`tmpfs`](Self::tmpfs) given before, where it is made.
    pub fn bind(self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        self.mount(Mount::Bind {
            source: source.into(),
            target: target.into(),
            read_only: false,
        })
    }

    /// As [`bind`](Self::bind), and nobody can write through it.
    pub fn bind_read_only(self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        self.mount(Mount::Bind {
            source: source.into(),
            target: target.into(),
            read_only: true,
        })
    }

    /// An empty directory of the process's own over `target`, e.g. `/run`.
    pub fn tmpfs(self, target: impl Into<PathBuf>) -> Self {
        self.mount(Mount::Tmpfs {
            target: target.into(),
        })
    }

    /// A session of its own: no signal from our terminal.
    pub fn new_session(mut self) -> Self {
        self.new_session = true;
        self
    }

    /// SIGKILL when this process ends, however it ends.
    pub fn die_with_parent(mut self) -> Self {
        self.die_with_parent = true;
        self
    }

    /// Standard input as a pipe handed to the caller; otherwise it is `/dev/null`.
    pub fn stdin_piped(mut self) -> Self {
        self.stdin = Stdin::Piped;
        self
    }

    pub fn stdout(mut self, output: Output) -> Self {
        self.stdout = output;
        self
    }

    pub fn stderr(mut self, output: Output) -> Self {
        self.stderr = output;
        self
    }

    /// Starts it; the caller owns the child and reaps it.
    pub fn spawn(&self, namespace: &Namespace) -> Result<Child, Error> {
        let mut command = self.prepare(namespace)?;
        let spawned = self.on_lasting_thread(move || command.spawn())?;
        spawned.map_err(system(self.action(namespace)))
    }

    /// Runs it to its end with stdout and stderr collected. Both grow with what it writes: for
    /// short tools.
    pub fn output(&self, namespace: &Namespace) -> Result<std::process::Output, Error> {
        let piped = self.clone().stdout(Output::Piped).stderr(Output::Piped);
        let child = piped.spawn(namespace)?;
        child
            .wait_with_output()
            .map_err(system(self.action(namespace)))
    }

    fn mount(mut self, mount: Mount) -> Self {
        self.mounts.push(mount);
        self
    }

    fn action(&self, namespace: &Namespace) -> String {
        format!(
            "starting `{}` in `{}`",
            self.program.to_string_lossy(),
            namespace.name()
        )
    }

    fn prepare(&self, namespace: &Namespace) -> Result<std::process::Command, Error> {
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.args);
        if self.env_clear {
            command.env_clear();
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command.stdin(match self.stdin {
            Stdin::Null => Stdio::null(),
            Stdin::Piped => Stdio::piped(),
        });
        command.stdout(open(&self.stdout)?);
        command.stderr(open(&self.stderr)?);
        child::install(&mut command, child::Plan::new(self, namespace)?);
        Ok(command)
    }

    /// The kernel takes the thread that forked for the parent, so a child that dies with its
    /// parent is forked by a thread that lives as long as this process.
    fn on_lasting_thread<T: Send + 'static>(
        &self,
        spawn: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        if !self.die_with_parent {
            return Ok(spawn());
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || drop(reply.send(spawn())));
        let gone = || Error::Panicked("the thread that starts children".into());
        starter().send(job).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that lives as long as the process. Callers wait for their turn when 16 are ahead.
fn starter() -> &'static mpsc::SyncSender<Job> {
    static STARTER: OnceLock<mpsc::SyncSender<Job>> = OnceLock::new();
    STARTER.get_or_init(|| {
        let (sender, jobs) = mpsc::sync_channel::<Job>(16);
        thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        sender
    })
}

fn open(output: &Output) -> Result<Stdio, Error> {
    match output {
        Output::Inherit => Ok(Stdio::inherit()),
        Output::Null => Ok(Stdio::null()),
        Output::Piped => Ok(Stdio::piped()),
        Output::File(path) => append(path)
            .map(Stdio::from)
            .map_err(system(format!("opening {} for output", path.display()))),
    }
}

fn append(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).open(path)
}
