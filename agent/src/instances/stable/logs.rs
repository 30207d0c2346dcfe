//! What crashes left, told to whoever asks.

use super::{Reply, Stable};
use messages::command::LogsRequest;
use tokio::sync::oneshot;

impl Stable {
    /// Answered elsewhere: a disk may take its time.
    pub(super) fn logs(&self, request: LogsRequest, answer: oneshot::Sender<Reply>) {
        let (crashes, host) = (self.world.crashes.clone(), self.world.id.clone());
        let max_payload = self.link.max_payload;
        tokio::spawn(async move {
            let reply = crashes.answer(&request, &host, max_payload).await;
            drop(answer.send(reply));
        });
    }
}
