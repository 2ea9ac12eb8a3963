//! What decode says on one delivery. Saying never waits: a sender's window bounds the replies under way, so a full queue is a
//! peer that does not read, which loses its stream by silence. Its last word has a place of its own: should it read on after
//! all, it learns how the delivery ended.

use proto::{DeliverReply, deliver_reply::Reply};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Replies that may wait for the transport; more than a sender's window of blocks.
const REPLIES: usize = 256;

type Message = Result<DeliverReply, Status>;

/// Clones speak on the same stream.
#[derive(Clone)]
pub(crate) struct Replies {
    queue: mpsc::Sender<Message>,
    /// The place of the last word, until it is said.
    last: Arc<Mutex<Option<OwnedPermit<Message>>>>,
}

impl Replies {
    pub fn channel() -> (Self, ReceiverStream<Message>) {
        let (queue, replies) = mpsc::channel(REPLIES + 1);
        let last = queue.clone().try_reserve_owned().ok();
        (Replies { queue, last: Arc::new(Mutex::new(last)) }, ReceiverStream::new(replies))
    }

    pub fn say(&self, reply: Reply) {
        let message = Ok(DeliverReply { reply: Some(reply) });
        match self.place_for(&message) {
            Some(place) => drop(place.send(message)),
            None => self.queue(message),
        }
    }

    /// Unless half of the queue waits: that half is for answers, which are not said twice, and proves life as well.
    pub fn beat(&self, heartbeat: proto::Heartbeat) {
        if self.queue.capacity() > REPLIES / 2 {
            self.say(Reply::Heartbeat(heartbeat));
        }
    }

    pub fn are_of(&self, stream: &Replies) -> bool {
        self.queue.same_channel(&stream.queue)
    }

    fn place_for(&self, message: &Message) -> Option<OwnedPermit<Message>> {
        let reply = message.as_ref().ok()?.reply.as_ref()?;
        let last = matches!(reply, Reply::Committed(_) | Reply::Error(_));
        last.then(|| self.last.lock().unwrap_or_else(PoisonError::into_inner).take()).flatten()
    }

    fn queue(&self, message: Message) {
        if let Err(error) = self.queue.try_send(message) {
            tracing::debug!(%error, "a reply found no reader");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn however_many_replies_wait_the_last_word_is_heard() {
        let (replies, mut heard) = Replies::channel();
        let accept = |index| Reply::Accept(proto::Accept { index });
        (0..REPLIES as u32 + 9).for_each(|index| replies.say(accept(index)));
        replies.beat(proto::Heartbeat::default());
        let error = proto::Error::new(proto::ErrorCode::StaleEpoch, "another has it");
        replies.clone().say(Reply::Error(error.clone()));
        replies.say(Reply::Error(error.clone()));
        drop(replies);
        for index in 0..REPLIES as u32 {
            assert_eq!(heard.next().await.unwrap().unwrap().reply, Some(accept(index)));
        }
        assert_eq!(heard.next().await.unwrap().unwrap().reply, Some(Reply::Error(error)));
        assert!(heard.next().await.is_none(), "there is one last word");
    }
}
