//! DELs that could not be done: by the CNI executable while the agent was away, or by the agent
//! while the kernel refused. A file each, in the folder `removed` beside the socket, which a reboot
//! empties as it does the pods. Names that begin with `.` are not whole yet.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use turnpike_ipam::Attachment;

/// Tombstones read at once; the rest is read the next time.
const BATCH: usize = 4096;
const LARGEST: u64 = 64 * 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tombstone {
    pub container_id: String,
    pub netns: String,
    pub ifname: String,
    pub network: String,
    pub pod_namespace: String,
    pub pod_name: String,
}

#[derive(Clone, Debug)]
pub struct Tombstones {
    folder: PathBuf,
}

impl Tombstones {
    /// The folder beside the CNI socket; root's alone.
    pub fn beside(socket: &Path) -> io::Result<Self> {
        let above = socket.parent().unwrap_or(Path::new("/"));
        let folder = above.join("removed");
        // What is beside it is not root's alone.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(above)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        Ok(Self { folder })
    }

    /// What waits to be done, with the file that says so. What cannot be read is put aside.
    pub fn read(&self) -> io::Result<Vec<(PathBuf, Tombstone)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)?.take(BATCH) {
            let path = entry?.path();
            let unfinished = path
                .file_name()
                .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if unfinished || path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read_one(&path) {
                Ok(tombstone) => found.push((path, tombstone)),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "unreadable tombstone set aside");
                    fs::rename(&path, path.with_extension("unreadable"))?;
                }
            }
        }
        Ok(found)
    }

    /// Where the attachment's is, if there is one.
    pub fn of(&self, attachment: &Attachment) -> PathBuf {
        self.folder.join(name(attachment))
    }

    /// Leaves one for the next time.
    pub fn leave(&self, attachment: &Attachment) -> io::Result<()> {
        let Attachment {
            container_id,
            ifname,
        } = attachment;
        let tombstone = Tombstone {
            container_id: container_id.clone(),
            ifname: ifname.clone(),
            ..Tombstone::default()
        };
        let name = name(attachment);
        let new = self.folder.join(format!(".{name}"));
        fs::write(&new, serde_json::to_vec(&tombstone)?)?;
        fs::rename(&new, self.folder.join(name))
    }
}

/// Does the DEL that the tombstone asks for, if it still stands, and takes it away when `del` says that
/// all of it is done: who is killed in between does it again. Whether it is gone then.
pub async fn fulfil(tombstone: &Path, del: impl Future<Output = bool>) -> bool {
    if !tombstone.exists() {
        return true;
    }
    if !del.await {
        return false;
    }
    let removed = fs::remove_file(tombstone);
    if let Err(error) = &removed {
        tracing::error!(path = %tombstone.display(), %error, "a tombstone stays though it is done");
    }
    removed.is_ok()
}

fn read_one(path: &Path) -> io::Result<Tombstone> {
    if fs::metadata(path)?.len() > LARGEST {
        return Err(io::Error::other("larger than any tombstone"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn name(attachment: &Attachment) -> String {
    let Attachment {
        container_id,
        ifname,
    } = attachment;
    format!("{}@{}.json", plain(container_id), plain(ifname))
}

/// Nothing in a file name that is not an id's, and no dot at its beginning.
fn plain(text: &str) -> String {
    let text = text.trim_start_matches('.');
    text.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_read_and_garbage_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let tombstones = Tombstones::beside(&folder.path().join("cni.sock")).unwrap();
        let attachment = Attachment {
            container_id: "../c/1".into(),
            ifname: "eth0".into(),
        };
        tombstones.leave(&attachment).unwrap();
        fs::write(folder.path().join("removed/x.json"), "{not json").unwrap();
        fs::write(folder.path().join("removed/.half.json.7"), "{").unwrap();
        let found = tombstones.read().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].1.container_id, "../c/1");
        assert_eq!(found[0].0, tombstones.of(&attachment));
        assert!(folder.path().join("removed/x.unreadable").exists());
    }

    #[tokio::test]
    async fn a_tombstone_stands_until_its_del_is_done_and_is_done_once() {
        let folder = tempfile::tempdir().unwrap();
        let tombstones = Tombstones::beside(&folder.path().join("cni.sock")).unwrap();
        let attachment = Attachment {
            container_id: "c1".into(),
            ifname: "eth0".into(),
        };
        tombstones.leave(&attachment).unwrap();
        let tombstone = tombstones.of(&attachment);
        for done in [false, true] {
            let mut stood = false;
            let del = async {
                stood = tombstone.exists();
                done
            };
            assert_eq!(fulfil(&tombstone, del).await, done);
            assert!(stood, "killed meanwhile, nobody would do it again");
            assert_eq!(tombstone.exists(), !done);
        }
        assert!(fulfil(&tombstone, async { panic!("an ADD has done it") }).await);
    }
}
