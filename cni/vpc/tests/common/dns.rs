//! Questions to a name server from inside a namespace.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use turnpike_vpc::netns::Namespace;

use super::connect;

pub(crate) fn ask(from: &Namespace, server: SocketAddr, name: &str, kind: RecordType) -> Message {
    let socket: UdpSocket = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let query = query(name, kind);
    socket.send_to(&query.to_vec().unwrap(), server).unwrap();
    let mut buffer = [0; 4096];
    let (length, peer) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(peer, server, "somebody else answered");
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.metadata.id, query.metadata.id);
    answer
}

pub(crate) fn ask_by_tcp(
    from: &Namespace,
    server: SocketAddr,
    name: &str,
    kind: RecordType,
) -> Message {
    let mut stream = connect(from, None, server).unwrap();
    let bytes = query(name, kind).to_vec().unwrap();
    let length = u16::try_from(bytes.len()).unwrap();
    stream
        .write_all(&[&length.to_be_bytes(), &bytes[..]].concat())
        .unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer).unwrap();
    Message::from_vec(&answer).unwrap()
}

pub(crate) fn addresses(answer: &Message) -> Vec<IpAddr> {
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    let data = answer
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
            _ => None,
        });
    data.collect()
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}
