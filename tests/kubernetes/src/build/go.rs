//! The Go toolchain of the machine, and running it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Cache, progress::Progress};

/// What CoreDNS, etcd and helm ask for in their go.mod; Kubernetes is content with less.
const OLDEST: (u32, u32) = (1, 26);

const INSTALL: &str = "\
Install Go from https://go.dev/dl/, for example:

  curl -LO https://go.dev/dl/go1.26.0.linux-amd64.tar.gz
  sudo tar -C /usr/local -xzf go1.26.0.linux-amd64.tar.gz
  export PATH=$PATH:/usr/local/go/bin";

#[derive(Debug)]
pub(super) struct Go {
    program: PathBuf,
    modules: PathBuf,
    compiled: PathBuf,
    logs: PathBuf,
}

impl Go {
    /// The machine's Go, if it is young enough.
    pub(super) fn find(cache: &Cache) -> Result<Self> {
        let places = std::env::var("PATH").unwrap_or_default();
        let found = places
            .split(':')
            .chain(["/usr/local/go/bin", "/usr/lib/go/bin"])
            .map(|folder| Path::new(folder).join("go"))
            .find(|path| path.is_file());
        let Some(program) = found else {
            bail!(
                "Kubernetes is built from source and needs Go, which is not on the PATH.\n{INSTALL}"
            );
        };
        let said = Command::new(&program)
            .args(["env", "GOVERSION"])
            .env("GOTOOLCHAIN", "local")
            .output()
            .with_context(|| program.display().to_string())?;
        let version = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        let young = parse(&version).is_some_and(|found| found >= OLDEST);
        ensure!(
            young,
            "{} is {version}; Kubernetes and its company need Go {}.{} or newer.\n{INSTALL}",
            program.display(),
            OLDEST.0,
            OLDEST.1
        );
        Ok(Self {
            program,
            modules: cache.root().join("gomod"),
            compiled: cache.root().join("gocache"),
            logs: cache.root().join("logs"),
        })
    }

    pub(super) fn log(&self, recipe: &str) -> PathBuf {
        self.logs.join(format!("{recipe}.log"))
    }

    /// Where a module's files are once it is downloaded.
    pub(super) fn source(&self, module: &str, version: &str) -> PathBuf {
        self.modules.join(format!("{module}@{version}"))
    }

    /// Runs the toolchain in a folder; what it says goes to the log, its last line to the screen.
    pub(super) fn run(
        &self,
        recipe: &str,
        folder: &Path,
        arguments: &[&str],
        progress: &mut Progress,
    ) -> Result<()> {
        let mut log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(recipe))?;
        writeln!(log, "$ go {}", arguments.join(" "))?;
        // It ends with us, however we end: nobody builds beside whoever takes the lock next.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(&self.program)
            .args(arguments)
            .current_dir(folder)
            .env("GOMODCACHE", &self.modules)
            .env("GOCACHE", &self.compiled)
            .env("GOFLAGS", "-modcacherw -buildvcs=false -mod=mod")
            .env("GOTOOLCHAIN", "local")
            .env("GOWORK", "off")
            .env("CGO_ENABLED", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("setpriv, of the package util-linux")?;
        let said = child
            .stderr
            .take()
            .context("standard error was asked for")?;
        let mut last = Vec::new();
        for line in BufReader::new(said).lines() {
            let line = line?;
            writeln!(log, "{line}")?;
            progress.says(&line);
            last.push(line);
            if last.len() > 20 {
                last.remove(0);
            }
        }
        let status = child.wait()?;
        ensure!(
            status.success(),
            "`go {}` ended with {status}:\n{}",
            arguments.first().copied().unwrap_or_default(),
            last.join("\n")
        );
        Ok(())
    }
}

/// `go1.26.8` and `go1.27rc1` as major and minor.
fn parse(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.strip_prefix("go")?.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(minor.len());
    Some((major, minor.get(..digits)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert_eq!(parse("go1.26.8"), Some((1, 26)));
        assert_eq!(parse("go1.27rc1"), Some((1, 27)));
        assert!(
            parse("go1.9.2") < Some(OLDEST),
            "nine is older than twenty-six"
        );
        assert_eq!(parse("devel +abc"), None);
    }
}
