//! What is built, of which version, and how.

use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use aws_lc_rs::digest::{SHA256, digest};

use super::{Cache, go::Go, progress::Progress};

/// The version of Kubernetes.
pub const KUBERNETES: &str = "1.34.4";

const PROGRAMS: [&str; 6] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
];

/// One module and what is made of it.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) name: &'static str,
    module: &'static str,
    version: &'static str,
    /// A cold build on two cores.
    pub(super) expected: Duration,
    what: What,
}

#[derive(Debug)]
enum What {
    /// One executable under six names, which costs a quarter of six.
    Kubernetes { main: &'static str },
    /// A program of our own few lines.
    Main { main: &'static str },
    /// Packages of the module, each an executable: its place in `bin`, its path in the module.
    Packages(&'static [(&'static str, &'static str)]),
    /// Files of the module, as they are.
    Files { from: &'static str },
}

pub(super) const ALL: [Recipe; 6] = [
    Recipe {
        name: "kubernetes",
        module: "k8s.io/kubernetes",
        version: "v1.34.4",
        expected: Duration::from_secs(15 * 60),
        what: What::Kubernetes {
            main: include_str!("../../go/kubernetes.go"),
        },
    },
    Recipe {
        name: "etcd",
        module: "go.etcd.io/etcd/server/v3",
        version: "v3.6.16",
        expected: Duration::from_secs(60),
        what: What::Main {
            main: include_str!("../../go/etcd.go"),
        },
    },
    Recipe {
        name: "coredns",
        module: "github.com/coredns/coredns",
        version: "v1.15.0",
        expected: Duration::from_secs(140),
        what: What::Main {
            main: include_str!("../../go/coredns.go"),
        },
    },
    Recipe {
        name: "plugins",
        module: "github.com/containernetworking/plugins",
        version: "v1.9.1",
        expected: Duration::from_secs(15),
        what: What::Packages(&[
            ("cni/loopback", "plugins/main/loopback"),
            ("cni/portmap", "plugins/meta/portmap"),
        ]),
    },
    Recipe {
        name: "helm",
        module: "helm.sh/helm/v3",
        version: "v3.22.0",
        expected: Duration::from_secs(4 * 60),
        what: What::Packages(&[("helm", "cmd/helm")]),
    },
    Recipe {
        name: "gateway-api",
        module: "sigs.k8s.io/gateway-api",
        version: "v1.6.3",
        expected: Duration::from_secs(10),
        what: What::Files {
            from: "config/crd/experimental",
        },
    },
];

impl Recipe {
    /// Whether what stands there was made by this very recipe.
    pub(super) fn is_made(&self, cache: &Cache) -> bool {
        fs::read_to_string(self.stamp_file(cache)).is_ok_and(|stamp| stamp == self.stamp())
            && self.outputs(cache).iter().all(|path| path.exists())
    }

    pub(super) fn make(&self, cache: &Cache, go: &Go, progress: &mut Progress) -> Result<()> {
        let folder = cache.root().join("src").join(self.name);
        fs::create_dir_all(&folder)?;
        let _ = fs::remove_file(go.log(self.name));
        let at = format!("{}@{}", self.module, self.version);
        progress.says("downloading");
        // Outside any module, so that nothing is asked of a half-made go.mod.
        go.run(self.name, cache.root(), &["mod", "download", &at], progress)?;
        let source = go.source(self.module, self.version);
        match self.what {
            What::Kubernetes { main } => {
                write(&folder.join("go.mod"), &kubernetes_module(&source)?)?;
                fs::copy(source.join("go.sum"), folder.join("go.sum"))?;
                writable(&folder.join("go.sum"))?;
                write(&folder.join("main.go"), main)?;
                let flags = format!("-s -w {}", kubernetes_version());
                self.compile(cache, go, &folder, "kubernetes", ".", &flags, progress)?;
                for name in PROGRAMS {
                    let link = cache.program(name);
                    let _ = fs::remove_file(&link);
                    symlink("kubernetes", link)?;
                }
            }
            What::Main { main } => {
                self.module(go, &folder, &at, progress)?;
                write(&folder.join("main.go"), main)?;
                self.compile(cache, go, &folder, self.name, ".", "-s -w", progress)?;
            }
            What::Packages(packages) => {
                self.module(go, &folder, &at, progress)?;
                for (place, package) in packages {
                    let package = format!("{}/{package}", self.module);
                    self.compile(cache, go, &folder, place, &package, "-s -w", progress)?;
                }
            }
            What::Files { from } => {
                let to = cache.root().join(self.name);
                let _ = fs::remove_dir_all(&to);
                fs::create_dir_all(&to)?;
                for entry in fs::read_dir(source.join(from))? {
                    let entry = entry?;
                    fs::copy(entry.path(), to.join(entry.file_name()))?;
                }
            }
        }
        write(&self.stamp_file(cache), &self.stamp())
    }

    /// A module of ours that depends on the recipe's.
    fn module(&self, go: &Go, folder: &Path, at: &str, progress: &mut Progress) -> Result<()> {
        let _ = fs::remove_file(folder.join("go.sum"));
        write(
            &folder.join("go.mod"),
            &format!("module turnpike.dev/cluster/{}\n\ngo 1.24.0\n", self.name),
        )?;
        go.run(self.name, folder, &["get", at], progress)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one command line")]
    fn compile(
        &self,
        cache: &Cache,
        go: &Go,
        folder: &Path,
        place: &str,
        package: &str,
        flags: &str,
        progress: &mut Progress,
    ) -> Result<()> {
        let program = cache.program(place);
        if let Some(parent) = program.parent() {
            fs::create_dir_all(parent)?;
        }
        let fresh = program.with_extension("new");
        let fresh_text = fresh.to_string_lossy();
        let flags = format!("-ldflags={flags}");
        // The whole machine is not ours: two at a time also bounds the memory that linking takes.
        let line = [
            "build",
            "-v",
            "-p",
            "2",
            "-trimpath",
            &flags,
            "-o",
            &fresh_text,
            package,
        ];
        go.run(self.name, folder, &line, progress)?;
        Ok(fs::rename(&fresh, &program)?)
    }

    fn outputs(&self, cache: &Cache) -> Vec<std::path::PathBuf> {
        match self.what {
            What::Kubernetes { .. } => PROGRAMS.iter().map(|name| cache.program(name)).collect(),
            What::Main { .. } => vec![cache.program(self.name)],
            What::Packages(packages) => packages
                .iter()
                .map(|(place, _)| cache.program(place))
                .collect(),
            What::Files { .. } => vec![cache.root().join(self.name)],
        }
    }

    fn stamp_file(&self, cache: &Cache) -> std::path::PathBuf {
        cache.programs().join(format!(".{}.stamp", self.name))
    }

    fn stamp(&self) -> String {
        let recipe = digest(&SHA256, format!("{:?}", self.what).as_bytes());
        let recipe = hex::encode(recipe.as_ref().get(..8).unwrap_or_default());
        format!("{} {recipe}\n", self.version)
    }
}

/// Kubernetes' own go.mod with the staging modules, which it replaces by folders beside it that a
/// module does not carry, as the releases that they are published as.
fn kubernetes_module(source: &Path) -> Result<String> {
    let text = fs::read_to_string(source.join("go.mod"))
        .with_context(|| format!("{} is not there", source.display()))?;
    let staging = format!("v0.{}", KUBERNETES.trim_start_matches("1."));
    let lines = text.lines().map(|line| {
        if line.starts_with("module ") {
            return "module turnpike.dev/cluster/kubernetes".to_owned();
        }
        match line.split_once(" => ./staging/") {
            Some((module, _)) => format!("{module} => {} {staging}", module.trim()),
            None => match line.strip_suffix(" v0.0.0") {
                Some(module) => format!("{module} {staging}"),
                None => line.replace(" v0.0.0 //", &format!(" {staging} //")),
            },
        }
    });
    let mut module = lines.collect::<Vec<_>>().join("\n");
    module.push_str(&format!("\n\nrequire k8s.io/kubernetes v{KUBERNETES}\n"));
    Ok(module)
}

/// What `kubectl version` and a node's status say; the linker fills it in.
fn kubernetes_version() -> String {
    let minor = KUBERNETES.split('.').nth(1).unwrap_or_default();
    let values = [
        ("gitVersion", format!("v{KUBERNETES}")),
        ("gitMajor", "1".to_owned()),
        ("gitMinor", minor.to_owned()),
        ("gitTreeState", "clean".to_owned()),
    ];
    let packages = [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ];
    let each = packages.iter().flat_map(|package| {
        values
            .iter()
            .map(move |(name, value)| format!("-X {package}.{name}={value}"))
    });
    each.collect::<Vec<_>>().join(" ")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// A module's files are read-only, and so is a copy of one.
fn writable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o644),
    )?)
}
