//! Container images of our own programs and of a few of the machine's, made by hand.
//!
//! An image is one archive as `docker save` writes it, kept in the cache under a name that its
//! content gives: what has not changed is not made again. Programs are stripped, and come with the
//! shared libraries that the loader asks for, at the places where it looks.

mod archive;
mod program;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use turnpike_rig::world::program;

use self::archive::{File, Image};
use crate::build::Cache;

/// No registry stands behind it: kubelets are told never to pull.
pub const REGISTRY: &str = "registry.local";
/// Our images' tags: the second is the same proxy under another name, for upgrades.
pub const TAGS: [&str; 2] = ["dev", "dev2"];
/// What workloads run on.
pub const NGINX: &str = "registry.local/workloads/nginx:1";
pub const CURL: &str = "registry.local/workloads/curl:1";
pub const BUSYBOX: &str = "registry.local/workloads/busybox:1";
pub(crate) const PAUSE: &str = "registry.local/pause:1";
pub(crate) const COREDNS: &str = "registry.local/coredns:1";

const CA_CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
const PATH: &str = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Makes what is missing of all images, and says where they are.
pub fn make(cache: &Cache, progress: &dyn Fn(&str)) -> Result<Vec<PathBuf>> {
    let workshop = program::Workshop::open(cache)?;
    let folder = cache.root().join("images");
    fs::create_dir_all(&folder)?;
    let mut archives = Vec::new();
    for image in all(cache, &workshop, progress)? {
        archives.push(image.write(&folder)?);
    }
    forget_others(&folder, &archives)?;
    Ok(archives)
}

fn all(cache: &Cache, workshop: &program::Workshop, progress: &dyn Fn(&str)) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for name in ["controller", "audit", "node", "gate", "proxy"] {
        progress(&format!("images: turnpike/{name}"));
        images.push(ours(name, workshop)?);
    }
    let proxy = images.last().context("there is a proxy")?;
    images.push(second_proxy(proxy));
    progress("images: nginx, curl, busybox, CoreDNS");
    let shell = shell(workshop)?;
    images.push(Image::new(BUSYBOX).layer(shell.clone()).command(&["sh"]));
    images.push(nginx(workshop, shell.clone())?);
    images.push(
        Image::new(CURL)
            .layer(shell)
            .layer(workshop.program("curl")?)
            .user("1000")
            .command(&["sleep", "infinity"]),
    );
    let pause = workshop.at("/bin/busybox", "/bin/busybox")?;
    images.push(
        Image::new(PAUSE)
            .layer(pause)
            .entrypoint(&["/bin/busybox", "sleep", "infinity"]),
    );
    let coredns = workshop.whole(&cache.program("coredns"), "/usr/local/bin/coredns");
    images.push(
        Image::new(COREDNS)
            .layer(vec![coredns])
            .entrypoint(&["/usr/local/bin/coredns"]),
    );
    Ok(images)
}

fn ours(name: &str, workshop: &program::Workshop) -> Result<Image> {
    let executable = format!("turnpike-{name}");
    let mut image = Image::new(&format!("{REGISTRY}/turnpike/{name}:{}", TAGS[0]))
        .layer(workshop.own(&program(&executable)?, &executable)?)
        .entrypoint(&[&format!("/usr/local/bin/{executable}")])
        .environment("PATH", PATH);
    let more = match name {
        "node" => {
            let mut more = workshop.own(&program("turnpike-cni")?, "turnpike-cni")?;
            more.extend(workshop.program("nft")?);
            more.push(workshop.whole(CA_CERTIFICATES.as_ref(), CA_CERTIFICATES));
            more
        }
        "audit" => workshop.own(&program("turnpike")?, "turnpike")?,
        _ => Vec::new(),
    };
    if !more.is_empty() {
        image = image.layer(more);
    }
    Ok(image)
}

/// The next version of the proxy, as far as a chart can tell.
fn second_proxy(first: &Image) -> Image {
    let mark = File::text("/etc/turnpike-release", &format!("{}\n", TAGS[1]));
    first
        .clone()
        .named(&format!("{REGISTRY}/turnpike/proxy:{}", TAGS[1]))
        .layer(vec![mark])
}

/// busybox under the names of its applets.
fn shell(workshop: &program::Workshop) -> Result<Vec<File>> {
    let mut files = workshop.at("/bin/busybox", "/bin/busybox")?;
    let listed = std::process::Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .context("/bin/busybox, of the package busybox-static")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    files.extend(
        listed
            .lines()
            .filter(|applet| *applet != "busybox")
            .map(|applet| File::link(&format!("/bin/{applet}"), "busybox")),
    );
    Ok(files)
}

fn nginx(workshop: &program::Workshop, shell: Vec<File>) -> Result<Image> {
    let mut files = workshop.program("nginx")?;
    files.push(File::text(
        "/etc/nginx/nginx.conf",
        include_str!("../../manifests/nginx.conf"),
    ));
    Ok(Image::new(NGINX)
        .layer(shell)
        .layer(files)
        .user("101")
        // As its own image says: what is under way is finished.
        .stop_signal("SIGQUIT")
        // Its log from before it has read its configuration too.
        .entrypoint(&["/usr/sbin/nginx", "-e", "/dev/stderr", "-g", "daemon off;"]))
}

/// What earlier runs made of other contents.
fn forget_others(folder: &std::path::Path, kept: &[PathBuf]) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() && !kept.contains(&path) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
