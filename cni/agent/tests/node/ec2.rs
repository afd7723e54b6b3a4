//! EC2 with a fault of one kind: it refuses one action, and does all else.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use turnpike_vpc::netns::Namespace;

const EC2: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 0, 2), 8773);

/// Stands in the node, before the box's EC2. Ends when it is dropped.
pub(crate) struct Refusing {
    pub(crate) url: String,
    at: SocketAddr,
    node: Namespace,
    state: Arc<State>,
    serves: Option<JoinHandle<()>>,
}

struct State {
    action: &'static str,
    refused: AtomicU32,
    ended: AtomicBool,
}

impl Refusing {
    pub(crate) fn start(node: &Namespace, action: &'static str) -> Self {
        let listener = node.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.unwrap().unwrap();
        let at = listener.local_addr().unwrap();
        let state = Arc::new(State {
            action,
            refused: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        });
        let serves = thread::spawn({
            let (node, state) = (node.clone(), Arc::clone(&state));
            move || serve(&listener, &node, &state)
        });
        Self {
            url: format!("http://{at}"),
            at,
            node: node.clone(),
            state,
            serves: Some(serves),
        }
    }

    pub(crate) fn refused(&self) -> u32 {
        self.state.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        let at = self.at;
        // Wakes it.
        self.node.run(move || TcpStream::connect(at)).ok();
        self.serves.take().map(JoinHandle::join);
    }
}

fn serve(listener: &TcpListener, node: &Namespace, state: &Arc<State>) {
    thread::scope(|scope| {
        while let Ok((client, _)) = listener.accept() {
            if state.ended.load(Ordering::Relaxed) {
                return;
            }
            scope.spawn(move || {
                // The agent sees what becomes of a call that is not answered.
                answer(client, node, state).ok();
            });
        }
    });
}

/// One request; then the connection ends.
fn answer(mut client: TcpStream, node: &Namespace, state: &State) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or_default();
        match &*name.to_ascii_lowercase() {
            "content-length" => length = value.trim().parse().map_err(io::Error::other)?,
            "connection" => continue,
            _ => {}
        }
        head += &line;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let form = String::from_utf8_lossy(&body);
    if form.contains(&format!("Action={}&", state.action)) {
        client.write_all(refusal(state.action).as_bytes())?;
        state.refused.fetch_add(1, Ordering::Relaxed);
        return Ok(());
    }
    let mut ec2 = node
        .run(|| TcpStream::connect(EC2))
        .map_err(io::Error::other)??;
    ec2.write_all(format!("{head}connection: close\r\n\r\n{form}").as_bytes())?;
    io::copy(&mut ec2, &mut client)?;
    Ok(())
}

fn refusal(action: &str) -> String {
    let body = format!(
        "<Response><Errors><Error><Code>UnauthorizedOperation</Code>\
         <Message>You are not authorized to perform {action}.</Message></Error></Errors>\
         <RequestID>none</RequestID></Response>"
    );
    let length = body.len();
    format!(
        "HTTP/1.1 403 Forbidden\r\ncontent-type: text/xml\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}
