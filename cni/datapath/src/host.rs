//! The node's own end: its route netlink socket, and links deleted together.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    Error, Mac,
    links::{self, Link},
    netlink::{Request, Rtnl},
    sysctl::Sysctls,
    worker::{Job, Worker},
};

/// Links on their way out are gathered in this group, which nothing else has reason to use.
const LEAVING: u32 = 0x7470_6b65;

/// The node's network. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    rtnl: Arc<Mutex<Rtnl>>,
    leaving: Worker<Leaving>,
    pub(crate) sysctls: Sysctls,
}

#[derive(Debug)]
struct Leaving {
    interface: String,
    mac: Option<Mac>,
}

impl Host {
    /// Binds to the network namespace of the runtime's threads.
    pub(crate) async fn open(sysctls: Sysctls) -> Result<Self, Error> {
        let rtnl = tokio::task::spawn_blocking(Rtnl::open)
            .await
            .map_err(|_| Error::Closed)??;
        let rtnl = Arc::new(Mutex::new(rtnl));
        // A socket of its own: a deletion waits for grace periods, and no ADD shall wait with it.
        let own = tokio::task::spawn_blocking(Rtnl::open)
            .await
            .map_err(|_| Error::Closed)??;
        Ok(Self {
            rtnl,
            leaving: Worker::start(own, delete_together),
            sysctls,
        })
    }

    /// Talks to the kernel on a thread that may block.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Rtnl) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let rtnl = Arc::clone(&self.rtnl);
        let task = tokio::task::spawn_blocking(move || {
            // Answers are told apart by sequence number, so a panic in between does no harm.
            work(&mut rtnl.lock().unwrap_or_else(PoisonError::into_inner))
        });
        task.await.map_err(|_| Error::Closed)?
    }

    /// Deletes the link of this name, if it has this address; one that is not there is fine.
    ///
    /// Alone it takes the kernel 20 ms, 34 in a group together take 33 ms, so they go together.
    pub(crate) async fn delete(&self, interface: &str, mac: Option<Mac>) -> Result<(), Error> {
        let interface = interface.to_owned();
        self.leaving.ask(Leaving { interface, mac }).await
    }

    /// Returns when links can be deleted no more.
    pub(crate) async fn ended(&self) {
        self.leaving.ended().await;
    }
}

fn delete_together(rtnl: &mut Rtnl, work: Vec<Job<Leaving>>) {
    let mut going = Vec::new();
    for job in work {
        match target(rtnl, &job.wish) {
            Ok(Some(index)) => going.push((index, job)),
            Ok(None) => drop(job.done.send(Ok(()))),
            Err(error) => drop(job.done.send(Err(error))),
        }
    }
    if going.len() > 1 {
        let mut requests: Vec<_> = going
            .iter()
            .map(|(index, job)| {
                let step = format!("gathering {} to be deleted", job.wish.interface);
                Request::new(step, 0, links::join_group(*index, LEAVING))
            })
            .collect();
        requests.push(Request::new(
            "deleting links",
            0,
            links::delete_group(LEAVING),
        ));
        if rtnl.run(requests).is_ok() {
            going
                .into_iter()
                .for_each(|(_, job)| drop(job.done.send(Ok(()))));
            return;
        }
    }
    for (index, job) in going {
        let step = format!("deleting link {}", job.wish.interface);
        let request = Request::new(step, 0, links::delete(index)).fine_if(&[libc::ENODEV]);
        let _ = job.done.send(rtnl.run(vec![request]));
    }
}

fn target(rtnl: &mut Rtnl, leaving: &Leaving) -> Result<Option<u32>, Error> {
    let found = Link::find(rtnl, &leaving.interface)?;
    let meant = |link: &Link| leaving.mac.is_none() || link.mac == leaving.mac;
    Ok(found.filter(meant).map(|link| link.index))
}
