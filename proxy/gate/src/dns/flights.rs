//! What servers answered: kept until it expires, and asked for once by all who miss it at a time.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Instant};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use hickory_proto::rr::RecordType;
use parking_lot::Mutex;

use super::{
    cache::Cache,
    message::{Code, Question, Reply},
    upstream::{AskError, ask},
};

type Answered = Result<Reply, Arc<AskError>>;
type Asking = BoxFuture<'static, Answered>;
type Key = (String, RecordType);

/// Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Answers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<Key, WeakShared<Asking>>>,
}

/// Ends the flight for those who come later, however it ends.
struct Landing(Arc<Inner>, Key);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.flights.lock().remove(&self.1);
    }
}

impl Answers {
    pub fn new(cache: Cache) -> Self {
        Self(Arc::new(Inner {
            cache: Mutex::new(cache),
            flights: Mutex::default(),
        }))
    }

    pub fn cached(&self, question: &Question) -> Option<Reply> {
        let mut cache = self.0.cache.lock();
        cache.get(&question.name, question.kind, Instant::now())
    }

    /// The server's answer; kept where it is one. `server` follows from the question.
    pub async fn ask(&self, server: SocketAddr, question: &Question) -> Answered {
        self.flight(server, question).await
    }

    fn flight(&self, server: SocketAddr, question: &Question) -> Shared<Asking> {
        let key = (question.name.clone(), question.kind);
        let mut flights = self.0.flights.lock();
        if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        let (inner, question) = (self.0.clone(), question.clone());
        let landing = Landing(inner.clone(), key.clone());
        let asking = async move {
            let _landing = landing;
            let reply = ask(server, &question).await.map_err(Arc::new)?;
            if matches!(reply.code, Code::Ok | Code::NoSuchName) {
                let now = Instant::now();
                let mut cache = inner.cache.lock();
                cache.put(&question.name, question.kind, reply.clone(), now);
            }
            Ok(reply)
        };
        let flight = asking.boxed().shared();
        flights.extend(flight.downgrade().map(|weak| (key, weak)));
        flight
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use hickory_proto::op::{Message, OpCode};
    use tokio::net::UdpSocket;

    use super::*;

    #[tokio::test]
    async fn a_hundred_equal_questions_at_once_make_one() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap();
        let answers = Answers::new(Cache::new(10));
        let question = Question::new("a.example.", RecordType::A);
        let asking = (0..100).map(|_| answers.ask(at, &question));
        let serving = async {
            let mut buffer = [0; 512];
            let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.add_query(query.queries[0].clone());
            let answer = answer.to_vec().unwrap();
            server.send_to(&answer, peer).await.unwrap();
        };
        let (replies, ()) = tokio::join!(join_all(asking), serving);
        assert!(replies.iter().all(Result::is_ok));
        let another = server.try_recv_from(&mut [0; 512]);
        assert!(another.is_err(), "asked twice");
        assert!(answers.0.flights.lock().is_empty());
        assert!(answers.cached(&question).is_some());
    }
}
