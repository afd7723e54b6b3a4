//! Kubernetes and its company, built once per machine of their Go modules.
//!
//! Everything is kept in one folder outside the target folder, so that `cargo clean` and a second
//! checkout cost nothing: `$TURNPIKE_CACHE`, or `~/.cache/turnpike/kubernetes`. A program is built
//! again when its recipe changes. What an interrupted build had compiled, the next one finds in
//! Go's own cache.

mod go;
mod progress;
mod recipes;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use self::{go::Go, progress::Progress, recipes::Recipe};

pub use self::recipes::KUBERNETES;

/// The folder that outlasts a run.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Where the folder is or would be.
    pub fn locate() -> Result<Self> {
        let root = match env::var_os("TURNPIKE_CACHE") {
            Some(chosen) => std::path::absolute(chosen)?,
            None => Path::new(&env::var_os("HOME").unwrap_or_else(|| "/root".into()))
                .join(".cache/turnpike/kubernetes"),
        };
        Ok(Self { root })
    }

    /// Finds the folder, and makes it where it is absent.
    pub fn open() -> Result<Self> {
        let cache = Self::locate()?;
        for folder in ["bin", "logs", "src"] {
            fs::create_dir_all(cache.root.join(folder)).with_context(|| {
                format!("{} (TURNPIKE_CACHE names another)", cache.root.display())
            })?;
        }
        Ok(cache)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the programs are.
    pub fn programs(&self) -> PathBuf {
        self.root.join("bin")
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// The custom resources of Gateway API, as their project publishes them.
    pub fn gateway_api(&self) -> PathBuf {
        self.root.join("gateway-api")
    }

    /// What a cluster of this name keeps on disk while it stands.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.root.join("worlds").join(name)
    }
}

/// Builds what is missing or was made by another recipe. Two at once: the second waits.
pub fn build(cache: &Cache) -> Result<()> {
    let missing = |recipe: &&Recipe| !recipe.is_made(cache);
    if recipes::ALL.iter().filter(missing).count() == 0 {
        return Ok(());
    }
    let go = Go::find(cache)?;
    let _lock = lock(cache)?;
    let todo: Vec<&Recipe> = recipes::ALL.iter().filter(missing).collect();
    eprintln!(
        "building {} into {}, once per machine",
        todo.iter()
            .map(|recipe| recipe.name)
            .collect::<Vec<_>>()
            .join(", "),
        cache.root.display()
    );
    for recipe in todo {
        let mut progress = Progress::begin(recipe.name, recipe.expected);
        let made = recipe.make(cache, &go, &mut progress);
        progress.end(made.is_ok());
        made.with_context(|| {
            format!(
                "{} was not built; the whole log is {}. What is compiled is kept: the next run goes on from there",
                recipe.name,
                go.log(recipe.name).display()
            )
        })?;
    }
    Ok(())
}

/// Held until the build ends, also by a crash.
fn lock(cache: &Cache) -> Result<fs::File> {
    let file = fs::File::create(cache.root.join("lock"))?;
    if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
        eprintln!(
            "another build is going on in {}; waiting for it",
            cache.root.display()
        );
        file.lock()?;
    }
    Ok(file)
}
