//! Out of file descriptors, the proxy waits and recovers. A process of its own, since the limit is
//! one of the process.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends with what it did not expect"
)]
#![allow(dead_code, reason = "shares the worlds of the data plane's tests")]

#[path = "data_plane/apps.rs"]
mod apps;
#[path = "data_plane/world.rs"]
mod world;

use std::fs::File;

use tokio::{io::AsyncWriteExt, net::TcpStream};
use turnpike_sidecar::observe::RefusalReason;

use crate::{
    apps::{full, get, serve, to_end},
    world::{Setup, Trust, web},
};

#[tokio::test]
async fn accepting_recovers_when_descriptors_come_back() {
    let app = serve(|_| async { http::Response::new(full("hello")) }).await;
    let caller = Setup::caller().start(&Trust::new());
    caller.known.set_service(web(&[(app, None)]));
    assert_eq!(get(caller.outbound(), "/").await.0, 200);

    let own = std::process::id().to_string();
    let limited = std::process::Command::new("prlimit");
    let limited = { limited }.args(["--pid", &own, "--nofile=128:"]).status();
    assert!(
        limited
            .expect("prlimit, of util-linux, is needed")
            .success()
    );
    let mut held = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        held.push(file);
    }
    // One for this end; the proxy has none for the other.
    held.pop();
    let mut stream = TcpStream::connect(caller.outbound()).await.unwrap();
    held.extend(File::open("/dev/null"));
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let details = caller.seen.refusal(RefusalReason::Overload).await;
    assert!(details.contains("accept"), "{details}");

    held.clear();
    let answer = to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
