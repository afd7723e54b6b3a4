//! The journal's file: append, commit, compact.
//!
//! One file, `pool.journal`. Appending is one write and one `fdatasync` for a whole batch.
//! Compaction writes `pool.journal.new`, syncs it, renames it over the file and syncs the folder,
//! so that at every instant one whole journal is there. A torn tail is cut when it is opened.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::{Record, Tail, decode, encode};

const FILE: &str = "pool.journal";
const NEW_FILE: &str = "pool.journal.new";
const LOCK_FILE: &str = "pool.lock";
/// A journal is compacted when it is this large and several times what its snapshot was.
const COMPACT_ABOVE: u64 = 256 * 1024;
const COMPACT_RATIO: u64 = 4;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Retrying may help: the disk is full, or busy.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is in use by another process; only one agent may run on a node", path = .0.display())]
    Locked(PathBuf),
}

/// The only writer of a node's journal.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    file: File,
    /// Bytes that are whole and committed.
    length: u64,
    snapshot_length: u64,
    syncs: u64,
    /// Held as long as the journal is.
    _lock: File,
}

/// What opening found.
#[derive(Debug)]
pub struct Opened {
    pub journal: Journal,
    pub records: Vec<Record>,
    pub tail: Tail,
    /// Bytes cut off; a damaged journal is kept whole beside it, under this name.
    pub cut: u64,
    pub kept_as: Option<PathBuf>,
}

impl Journal {
    /// Opens the journal of `folder`, which is made if it is not there.
    pub fn open(folder: &Path) -> Result<Opened, JournalError> {
        fs::create_dir_all(folder).map_err(failed("make", folder))?;
        let lock = lock(folder)?;
        let path = folder.join(FILE);
        // One that was not renamed yet was not acknowledged to anybody.
        match fs::remove_file(folder.join(NEW_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &folder.join(NEW_FILE))(error));
            }
            _ => {}
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed("open", &path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(failed("read", &path))?;
        let (records, end, tail) = decode(&bytes);
        let cut = (bytes.len() - end) as u64;
        let kept_as = match tail {
            Tail::Damaged => Some(keep(folder, &bytes)?),
            Tail::Clean | Tail::Torn => None,
        };
        let mut journal = Self {
            folder: folder.to_owned(),
            file,
            length: end as u64,
            snapshot_length: end as u64,
            syncs: 0,
            _lock: lock,
        };
        if cut > 0 {
            journal.cut()?;
        }
        journal
            .file
            .seek(SeekFrom::Start(end as u64))
            .map_err(failed("seek", &path))?;
        sync_folder(folder)?;
        Ok(Opened {
            journal,
            records,
            tail,
            cut,
            kept_as,
        })
    }

    /// Appends whole lines and commits them. After an error nothing of them is in the journal.
    pub fn append(&mut self, lines: &[u8]) -> Result<(), JournalError> {
        let path = self.folder.join(FILE);
        let written = self.file.write_all(lines).map_err(failed("write", &path));
        self.syncs += 1;
        let committed = written.and_then(|()| self.file.sync_data().map_err(failed("sync", &path)));
        if committed.is_err() {
            // What stays behind, if this fails too, is a tail nobody was told of; the next
            // commit rewrites the file.
            self.cut().ok();
        } else {
            self.length += lines.len() as u64;
        }
        committed
    }

    /// Replaces everything with `snapshot`.
    pub fn rewrite(&mut self, snapshot: &[Record]) -> Result<(), JournalError> {
        let (path, new) = (self.folder.join(FILE), self.folder.join(NEW_FILE));
        let mut bytes = Vec::new();
        snapshot
            .iter()
            .for_each(|record| encode(record, &mut bytes));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new)
            .map_err(failed("create", &new))?;
        file.write_all(&bytes).map_err(failed("write", &new))?;
        self.syncs += 1;
        file.sync_all().map_err(failed("sync", &new))?;
        fs::rename(&new, &path).map_err(failed("rename", &new))?;
        self.file = file;
        self.length = bytes.len() as u64;
        self.snapshot_length = self.length;
        sync_folder(&self.folder)
    }

    pub fn wants_compaction(&self) -> bool {
        self.length > COMPACT_ABOVE && self.length > self.snapshot_length * COMPACT_RATIO
    }

    /// Commits so far, to see how many callers shared one.
    pub fn syncs(&self) -> u64 {
        self.syncs
    }

    fn cut(&mut self) -> Result<(), JournalError> {
        let path = self.folder.join(FILE);
        self.file
            .set_len(self.length)
            .map_err(failed("truncate", &path))?;
        self.file
            .seek(SeekFrom::Start(self.length))
            .map_err(failed("seek", &path))?;
        self.file.sync_data().map_err(failed("sync", &path))
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io {
        action,
        path,
        source,
    }
}

fn lock(folder: &Path) -> Result<File, JournalError> {
    let path = folder.join(LOCK_FILE);
    let file = File::create(&path).map_err(failed("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::Locked(path)),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path)(error)),
    }
}

fn keep(folder: &Path, bytes: &[u8]) -> Result<PathBuf, JournalError> {
    let free = |n: &u32| !folder.join(format!("{FILE}.damaged-{n}")).exists();
    // Ten of them say all there is to say; the last is overwritten then.
    let n = (0..10).find(free).unwrap_or(9);
    let path = folder.join(format!("{FILE}.damaged-{n}"));
    fs::write(&path, bytes).map_err(failed("write", &path))?;
    Ok(path)
}

/// A name in a folder is durable when the folder is.
fn sync_folder(folder: &Path) -> Result<(), JournalError> {
    File::open(folder)
        .and_then(|it| it.sync_all())
        .map_err(failed("sync", folder))
}
