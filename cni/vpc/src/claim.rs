//! What a box has taken of the machine, written down before it is taken, so that it can be given
//! back whatever happens: `/run/turnpike-vpc/NAME.json`.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::netns::{self, Namespace, Process, system};

const DIRECTORY: &str = "/run/turnpike-vpc";
/// How long whoever is asked to end may take.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{0}` cannot name a box: use 1 to 40 lower-case letters, digits and `-`")]
    Name(String),
    #[error("box `{name}` runs as process {pid}; end it with `turnpike-vpc down --name {name}`")]
    Running { name: String, pid: i32 },
    #[error("box `{0}` is not claimed; `turnpike-vpc run` claims it")]
    Unknown(String),
    #[error("process {0} of the box survived SIGKILL")]
    Immortal(i32),
    #[error(transparent)]
    Namespace(#[from] netns::Error),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    owner: Process,
    state: PathBuf,
    namespaces: BTreeSet<String>,
}

/// Writes down that this process makes these namespaces, after cleaning up what an earlier box of
/// the name left. Refused while that one lives.
pub fn take(name: &str, state: &Path, namespaces: &[&Namespace]) -> Result<(), Error> {
    let refuse_living = |old: &Record| match old.owner {
        owner if owner.is_alive() && owner != Process::current() => Err(Error::Running {
            name: name.into(),
            pid: owner.pid,
        }),
        _ => Ok(()),
    };
    if let Some(old) = read(name)? {
        refuse_living(&old)?;
        remove_namespaces(&old)?;
    }
    let _lock = lock()?;
    // Somebody else may have been faster.
    read(name)?.as_ref().map_or(Ok(()), refuse_living)?;
    let names = namespaces
        .iter()
        .map(|namespace| namespace.name().to_owned())
        .collect();
    let record = Record {
        owner: Process::current(),
        state: state.into(),
        namespaces: names,
    };
    write(name, &record)?;
    // Left by something that was not written down; the name says whose it was.
    namespaces
        .iter()
        .try_for_each(|namespace| namespace.remove(GRACE))?;
    Ok(())
}

/// Adds a namespace, of a pod for example, to what goes away with the box. Call it before the
/// namespace is made.
pub fn add(name: &str, namespace: &Namespace) -> Result<(), Error> {
    let _lock = lock()?;
    let mut record = read(name)?.ok_or_else(|| Error::Unknown(name.into()))?;
    record.namespaces.insert(namespace.name().into());
    write(name, &record)
}

/// Takes a namespace off the list again once it is removed.
pub fn forget(name: &str, namespace: &Namespace) -> Result<(), Error> {
    let _lock = lock()?;
    let Some(mut record) = read(name)? else {
        return Ok(());
    };
    record.namespaces.remove(namespace.name());
    write(name, &record)
}

/// Ends the box if it runs, and removes all that it claimed; says whether there was anything.
pub fn release(name: &str) -> Result<bool, Error> {
    let Some(record) = read(name)? else {
        return Ok(false);
    };
    if record.owner != Process::current() {
        end(record.owner)?;
    }
    // Without the lock, which others wait for; so again if the list has grown meanwhile.
    while let Some(record) = read(name)? {
        remove_namespaces(&record)?;
        let _lock = lock()?;
        if read(name)?.is_some_and(|now| now.namespaces == record.namespaces) {
            remove(&record.state.join("ready"))?;
            remove(&path(name)?)?;
        }
    }
    Ok(true)
}

/// Absent already is done.
fn remove(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(system(format!("removing {}", file.display()))(error).into())
        }
        _ => Ok(()),
    }
}

fn end(owner: Process) -> Result<(), Error> {
    let begun = Instant::now();
    owner.signal(Signal::SIGTERM)?;
    let mut killed = false;
    while owner.is_alive() {
        // Its own clean-up includes waiting for others.
        if begun.elapsed() > GRACE * 2 && !killed {
            owner.signal(Signal::SIGKILL)?;
            killed = true;
        }
        if begun.elapsed() > GRACE * 3 {
            return Err(Error::Immortal(owner.pid));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// All at once, since each may have to wait for processes; the first error is told.
fn remove_namespaces(record: &Record) -> Result<(), Error> {
    let removed = thread::scope(|scope| {
        let threads: Vec<_> = record
            .namespaces
            .iter()
            .map(|name| scope.spawn(move || Namespace::handle(name)?.remove(GRACE)))
            .collect();
        let gone = |name: &str| Err(netns::Error::Panicked(name.into()));
        let results = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| gone("?")));
        results.collect::<Vec<_>>()
    });
    removed
        .into_iter()
        .collect::<Result<(), _>>()
        .map_err(Error::from)
}

fn path(name: &str) -> Result<PathBuf, Error> {
    if !crate::spec::is_label(name) || name.len() > 40 {
        return Err(Error::Name(name.into()));
    }
    Ok(Path::new(DIRECTORY).join(format!("{name}.json")))
}

fn read(name: &str) -> Result<Option<Record>, Error> {
    let path = path(name)?;
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(system(format!("reading {}", path.display()))(error).into()),
    };
    let record = serde_json::from_slice(&text)
        .map_err(|error| system(format!("reading {}", path.display()))(io::Error::from(error)))?;
    Ok(Some(record))
}

fn write(name: &str, record: &Record) -> Result<(), Error> {
    let path = path(name)?;
    let fresh = path.with_extension("new");
    let written = serde_json::to_vec(record)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(&fresh, text))
        .and_then(|()| fs::rename(&fresh, &path));
    written
        .map_err(system(format!("writing {}", path.display())))
        .map_err(Error::from)
}

/// Held by whoever changes a record; let go with the file, also by a crash.
fn lock() -> Result<fs::File, Error> {
    let locked = fs::create_dir_all(DIRECTORY).and_then(|()| {
        let directory = fs::File::open(DIRECTORY)?;
        directory.lock()?;
        Ok(directory)
    });
    locked
        .map_err(system(format!("locking {DIRECTORY}")))
        .map_err(Error::from)
}
