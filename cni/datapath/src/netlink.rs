//! Route netlink in batches: one system call hands the kernel all messages of a step, which it
//! handles in order and answers one by one. `rtnetlink` builds the messages; its own connection
//! would be a task and a wake-up for each.

use std::{collections::HashMap, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::Error;

pub(crate) const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
pub(crate) const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// One thing asked of the kernel.
#[derive(Debug)]
pub(crate) struct Request {
    /// For the error: what it is, in words.
    step: String,
    flags: u16,
    message: RouteNetlinkMessage,
    /// Errors that mean it is as wanted already.
    fine: &'static [i32],
}

impl Request {
    pub(crate) fn new(step: impl Into<String>, flags: u16, message: RouteNetlinkMessage) -> Self {
        Self {
            step: step.into(),
            flags,
            message,
            fine: &[],
        }
    }

    pub(crate) fn fine_if(mut self, errors: &'static [i32]) -> Self {
        self.fine = errors;
        self
    }
}

/// A socket bound to the namespace of the thread that opened it, wherever it is used. Blocks.
#[derive(Debug)]
pub(crate) struct Rtnl {
    socket: Socket,
    sequence: u32,
}

impl Rtnl {
    pub(crate) fn open() -> Result<Self, Error> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_netlink_get_strict_chk(true)?;
            Ok(socket)
        };
        let socket = open().map_err(Error::kernel("opening a route netlink socket"))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Does all of it, in order; the first failure is told, the others tried nevertheless.
    pub(crate) fn run(&mut self, requests: Vec<Request>) -> Result<(), Error> {
        let mut waiting = HashMap::new();
        let mut buffer = Vec::new();
        for (order, request) in requests.into_iter().enumerate() {
            let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
            let sequence = self.append(&mut buffer, flags, request.message);
            waiting.insert(sequence, (order, request.step, request.fine));
        }
        let mut failed: Option<(usize, Error)> = None;
        let exchange = Error::kernel("talking to route netlink");
        let mut receive = || -> io::Result<()> {
            self.socket.send(&buffer, 0)?;
            while !waiting.is_empty() {
                for answer in messages(&self.socket.recv_from_full()?.0)? {
                    let NetlinkPayload::Error(error) = &answer.payload else {
                        continue;
                    };
                    let Some((order, step, fine)) = waiting.remove(&answer.header.sequence_number)
                    else {
                        continue;
                    };
                    let source = error.to_io();
                    let is_fine = source
                        .raw_os_error()
                        .is_some_and(|code| fine.contains(&code));
                    let first = failed.as_ref().is_none_or(|(earlier, _)| order < *earlier);
                    if error.code.is_some() && !is_fine && first {
                        failed = Some((order, Error::Kernel { step, source }));
                    }
                }
            }
            Ok(())
        };
        receive().map_err(exchange)?;
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// What answers one question: one message, or as many as a dump has. What does not exist is
    /// None of them.
    pub(crate) fn ask(
        &mut self,
        dump: bool,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut buffer = Vec::new();
        let how = if dump { NLM_F_DUMP } else { NLM_F_ACK };
        let sequence = self.append(&mut buffer, NLM_F_REQUEST | how, message);
        self.socket.send(&buffer, 0)?;
        let mut found = Vec::new();
        loop {
            for answer in messages(&self.socket.recv_from_full()?.0)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(found),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, to: &mut Vec<u8>, flags: u16, message: RouteNetlinkMessage) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = to.len();
        to.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut to[start..start + message.buffer_len()]);
        self.sequence
    }
}

fn messages(bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
    let mut messages = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let message = NetlinkMessage::deserialize(rest).map_err(invalid)?;
        let length = (message.header.length as usize).next_multiple_of(4).max(16);
        messages.push(message);
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(messages)
}
