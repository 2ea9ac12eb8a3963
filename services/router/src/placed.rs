//! A request on its workers: the driver of [`handoff::placement::Placement`], which decides what follows
//! from what. Merges the events of prefill and decode into one stream of tokens, replaces a lost prefill
//! worker while decode keeps what it has, and says how the placement ended.

use crate::{
    admission::{Offer, Ticket},
    call::{DecodeStream, Failure, Listening, prefill},
    cluster::{Credit, Slot},
    config,
    request::{Life, Reserved},
};
use handoff::placement::{Action, End, Event, Placement, State};
use proto::{
    Advance, DecodeEvent, DecodeFinished, Delivered, Error, ErrorCode, Finished, Member, PartName, Place,
    PrefillEvent, PrefillRequest, Token, decode_call::Call, decode_event::Event as Decode,
    prefill_event::Event as Prefill,
};
use std::{future::pending, sync::Arc};
use tokio::time::{Instant, sleep_until};

/// Prefill workers tried on one reservation; after that decode itself is in doubt, and all is placed anew.
const PREFILLS: u32 = 2;

pub enum Ending {
    Finished(Finished),
    /// Place it again; the cause names why.
    Elsewhere(&'static str),
    Failed(Error),
}

impl From<Error> for Ending {
    fn from(error: Error) -> Self {
        Ending::Failed(error)
    }
}

pub struct Placed<'a> {
    life: &'a mut Life,
    machine: Placement,
    /// What the decode worker said first, not yet judged.
    opening: Option<DecodeEvent>,
    decode: DecodeStream,
    slot: Slot,
    /// One member of role both does everything.
    here: bool,
    /// Until the first token.
    credit: Option<Credit>,
    prefill: Option<Listening<PrefillEvent>>,
    /// Waiting for the credit of another prefill member.
    ticket: Option<(Ticket, PrefillRequest)>,
    /// A prefill member that says that decode is lost; decode's own answer decides which of them is.
    doubted: Option<(Arc<Member>, Failure)>,
    /// Why the sequence moves, if nobody is to blame.
    cause: Option<&'static str>,
    /// The token that the machine is judging.
    incoming: Option<Token>,
    /// Decode is ahead of prefill, which has yet to tell the first token on its own connection. Decode is
    /// not heard further until then.
    early: Option<DecodeEvent>,
    finished: Option<Finished>,
    /// Decode has to answer an advance by then.
    answer_by: Option<Instant>,
}

enum Heard {
    Decode(Result<DecodeEvent, Failure>),
    Prefill(Result<PrefillEvent, Failure>),
    Credit(Result<Offer, Error>),
    Unanswered,
}

impl<'a> Placed<'a> {
    pub fn new(life: &'a mut Life, reserved: Reserved) -> Self {
        let Reserved { offer, decode, first } = reserved;
        Placed {
            life,
            machine: Placement::new(PREFILLS),
            opening: Some(first),
            decode,
            here: offer.grant.prefill.member.id == offer.grant.decode.member.id,
            slot: offer.grant.decode,
            credit: Some(offer.grant.prefill),
            prefill: None,
            ticket: None,
            doubted: None,
            cause: None,
            incoming: None,
            early: None,
            finished: None,
            answer_by: None,
        }
    }

    pub async fn run(mut self) -> Ending {
        let mut heard = self.opening.take().map(|first| Heard::Decode(Ok(first)));
        loop {
            let next = match heard.take() {
                Some(first) => first,
                None => self.listen().await,
            };
            if let Err(ending) = self.react(next).await {
                self.remember();
                return ending;
            }
        }
    }

    async fn listen(&mut self) -> Heard {
        tokio::select! {
            event = self.decode.events.next(), if self.early.is_none() => Heard::Decode(event),
            event = next(&mut self.prefill) => Heard::Prefill(event),
            offer = offer(&mut self.ticket) => Heard::Credit(offer),
            () = at(self.answer_by) => Heard::Unanswered,
        }
    }

    async fn react(&mut self, heard: Heard) -> Result<(), Ending> {
        match heard {
            Heard::Decode(Ok(event)) => self.decode_event(event).await,
            Heard::Decode(Err(failure)) => self.decode_lost(failure).await,
            Heard::Prefill(Ok(event)) => self.prefill_event(event).await,
            Heard::Prefill(Err(failure)) => self.prefill_lost(failure).await,
            Heard::Credit(Ok(offer)) => self.credit_granted(offer).await,
            Heard::Credit(Err(error)) => Err(no_credit(error)),
            Heard::Unanswered => {
                let message = format!("decode worker {} did not answer an advance", self.slot.member.id);
                let error = Error::new(ErrorCode::WorkerLost, message);
                self.decode_lost(Failure { error, lost: true }).await
            }
        }
    }

    async fn decode_event(&mut self, event: DecodeEvent) -> Result<(), Ending> {
        let latency = event.latency;
        let ends = matches!(event.event, Some(Decode::Decoding(_) | Decode::Finished(_)));
        if ends && !self.here && self.machine.first().is_none() && self.prefill.is_some() {
            self.early = Some(DecodeEvent { event: event.event, latency });
            return Ok(());
        }
        match event.event {
            Some(Decode::Token(token)) => {
                self.life.meter.call(latency.as_ref(), Place::Router);
                self.judge(token, |_| Event::Token).await
            }
            Some(Decode::Finished(DecodeFinished { reason, stop_token })) => {
                self.finish(Finished { reason, stop_token }).await
            }
            Some(Decode::Reserved(reserved)) => {
                let (reservation, epoch, present) =
                    (reserved.reservation, reserved.epoch, reserved.blocks_present);
                self.tell(Event::Reserved { reservation, epoch, present }).await
            }
            Some(Decode::Decoding(decoding)) => {
                self.handed_off();
                let token =
                    decoding.first_token.ok_or_else(|| self.protocol("Decoding without a first token"))?;
                self.judge(token, |token| Event::Decoding { token }).await
            }
            Some(Decode::LocalPrefill(local)) => {
                let id = self.slot.member.id.clone();
                self.life.started(local.cached_tokens, &id, &id).await?;
                self.tell(Event::LocalPrefill).await
            }
            Some(Decode::PromptLogprob(logprob)) => Ok(self.life.prompt_logprob(logprob).await?),
            Some(Decode::Advanced(advanced)) => {
                self.answer_by = None;
                self.settle_doubt()?;
                self.life.migrate(self.cause.take().unwrap_or("prefill_lost"));
                self.tell(Event::Advanced { epoch: advanced.epoch, accepted: advanced.accepted }).await
            }
            Some(Decode::AlreadyComplete(_)) => {
                (self.answer_by, self.doubted, self.cause) = (None, None, None);
                self.tell(Event::AlreadyComplete).await
            }
            Some(Decode::Preempted(_)) => self.tell(Event::Preempted).await,
            Some(Decode::Heartbeat(_) | Decode::Error(_)) | None => Ok(()),
        }
    }

    async fn finish(&mut self, finished: Finished) -> Result<(), Ending> {
        self.finished = Some(finished);
        self.tell(Event::Finished).await
    }

    async fn prefill_event(&mut self, event: PrefillEvent) -> Result<(), Ending> {
        let epoch = self.machine.epoch();
        match event.event {
            Some(Prefill::Started(started)) => self.prefill_started(started.cached_tokens).await,
            Some(Prefill::FirstToken(token)) => {
                self.life.meter.call(event.latency.as_ref(), Place::Router);
                self.judge(token, |token| Event::FirstToken { epoch, token }).await?;
                match self.early.take() {
                    Some(event) => self.decode_event(event).await,
                    None => Ok(()),
                }
            }
            Some(Prefill::PromptLogprob(logprob)) => Ok(self.life.prompt_logprob(logprob).await?),
            Some(Prefill::Delivered(delivered)) => self.delivered(epoch, delivered).await,
            Some(Prefill::Heartbeat(_) | Prefill::Error(_)) | None => Ok(()),
        }
    }

    /// Without a first token of its own, prefill was lost at the very end.
    fn handed_off(&mut self) {
        let part = if self.machine.first().is_some() { PartName::Handoff } else { PartName::Lost };
        self.life.meter.lap(part, Place::Router);
    }

    async fn prefill_started(&mut self, cached_tokens: u32) -> Result<(), Ending> {
        let Some(prefill) = self.prefill.as_ref().map(|prefill| prefill.member().id.clone()) else {
            return Ok(());
        };
        self.life.shared.cluster.trust(&prefill);
        let decode = self.slot.member.id.clone();
        Ok(self.life.started(cached_tokens, &prefill, &decode).await?)
    }

    async fn delivered(&mut self, epoch: u32, delivered: Delivered) -> Result<(), Ending> {
        if self.machine.first().is_none() {
            return Err(self.protocol("Delivered before a first token"));
        }
        if let Some(reason) = delivered.finished {
            return self.finish(Finished { reason, stop_token: delivered.stop_token }).await;
        }
        self.prefill = None;
        self.tell(Event::Delivered { epoch }).await
    }

    /// The machine says whether this token goes to the client. Two workers that name different first tokens
    /// would give an answer that neither of them computed.
    async fn judge(&mut self, token: Token, event: impl FnOnce(u32) -> Event) -> Result<(), Ending> {
        let event = event(token.id);
        let repeats = matches!(event, Event::FirstToken { .. } | Event::Decoding { .. });
        if repeats && self.machine.first().is_some_and(|first| first != token.id) {
            return Err(self.protocol("a first token other than the one the client has"));
        }
        self.incoming = Some(token);
        self.tell(event).await
    }

    async fn decode_lost(&mut self, failure: Failure) -> Result<(), Ending> {
        self.doubted = None;
        if failure.is_draining() {
            self.cause = Some("drained");
            return self.tell(Event::Preempted).await;
        }
        if self.ticket.is_some() && !failure.lost {
            // It has waited for a prefill that we did not find.
            return Err(Ending::Elsewhere("prefill_lost"));
        }
        // It could not read what this prefill member offers: they are not to meet again, whoever of them is the cause.
        if let Some(prefill) = self.prefill.as_ref().filter(|_| failure.is_between_workers()) {
            self.life.avoid(&prefill.member().id);
        }
        let member = self.slot.member.clone();
        self.life.blame(&member, &failure)?;
        self.tell(Event::DecodeLost).await
    }

    async fn prefill_lost(&mut self, failure: Failure) -> Result<(), Ending> {
        self.life.meter.lap(PartName::Lost, Place::Router);
        let member = self.prefill.take().map(|prefill| prefill.member().clone());
        if let Some(event) = self.early.take() {
            return self.prefill_lost_at_the_end(event).await;
        }
        if let (State::Prefilling, Some(member)) = (self.machine.state(), member) {
            self.judge_prefill(member, failure)?;
        }
        self.tell(Event::PrefillLost { epoch: self.machine.epoch() }).await
    }

    fn judge_prefill(&mut self, member: Arc<Member>, failure: Failure) -> Result<(), Error> {
        if failure.is_draining() {
            self.life.shared.cluster.refused(&member.id);
            self.cause = Some("drained");
        } else if failure.is_between_workers() {
            self.doubted = Some((member, failure));
        } else {
            self.life.shared.cluster.refused(&member.id);
            self.life.blame(&member, &failure)?;
        }
        Ok(())
    }

    /// Decode lives, but this prefill member does not get through to it: they are not to meet again.
    fn settle_doubt(&mut self) -> Result<(), Error> {
        let Some((member, failure)) = self.doubted.take() else { return Ok(()) };
        self.life.avoid(&self.slot.member.id);
        self.life.blame(&member, &failure)
    }

    /// Decode has all of it, and knows the first token; but prompt logprobs are gone with prefill.
    async fn prefill_lost_at_the_end(&mut self, event: DecodeEvent) -> Result<(), Ending> {
        if self.life.path.owes_prompt_logprobs() {
            return Err(Ending::Elsewhere("prefill_lost"));
        }
        self.decode_event(event).await?;
        self.tell(Event::PrefillLost { epoch: self.machine.epoch() }).await
    }

    async fn credit_granted(&mut self, offer: Offer) -> Result<(), Ending> {
        let Some((ticket, request)) = self.ticket.take() else { return Ok(()) };
        ticket.admit();
        self.life.meter.lap(PartName::Queue, Place::Router);
        self.credit = Some(offer.grant.prefill);
        self.ask(request).await
    }

    async fn tell(&mut self, event: Event) -> Result<(), Ending> {
        for action in self.machine.on(event) {
            self.perform(action).await?;
        }
        Ok(())
    }

    async fn perform(&mut self, action: Action) -> Result<(), Ending> {
        match action {
            Action::AskPrefill { reservation, epoch, present, accepted, forced } => {
                let request = self.request(reservation, epoch, present, accepted, forced);
                self.ask(request).await
            }
            Action::Advance { reservation, epoch } => self.advance(reservation, epoch),
            Action::First { .. } | Action::Forward => self.forward().await,
            Action::DropPrefill => {
                (self.prefill, self.ticket, self.credit) = (None, None, None);
                Ok(())
            }
            // The call ends with this placement.
            Action::DropDecode => Ok(()),
            Action::End(end) => Err(self.ending(end)),
        }
    }

    fn ending(&mut self, end: End) -> Ending {
        if end == End::PrefillLost
            && let Err(error) = self.settle_doubt()
        {
            return Ending::Failed(error);
        }
        match (end, self.finished.take()) {
            (End::Finished, Some(finished)) => Ending::Finished(finished),
            (End::Preempted, _) => Ending::Elsewhere(self.cause.unwrap_or("preempted")),
            (End::PrefillLost, _) => Ending::Elsewhere(self.cause.unwrap_or("prefill_lost")),
            (End::DecodeLost, _) => Ending::Elsewhere("decode_lost"),
            (End::Finished | End::Protocol, _) => self.protocol("a message out of its place"),
        }
    }

    async fn forward(&mut self) -> Result<(), Ending> {
        self.announce().await?;
        self.credit = None;
        match self.incoming.take() {
            Some(token) => Ok(self.life.token(token).await?),
            None => Err(self.protocol("no token where one was due")),
        }
    }

    /// Decode may tell of the first token before prefill has said that it began.
    async fn announce(&mut self) -> Result<(), Ending> {
        let Some(credit) = &self.credit else { return Ok(()) };
        let (prefill, decode) = (credit.member.id.clone(), self.slot.member.id.clone());
        Ok(self.life.started(0, &prefill, &decode).await?)
    }

    fn advance(&mut self, reservation: u64, epoch: u32) -> Result<(), Ending> {
        let silence = config::ms(self.life.shared.config.liveness.silence_ms);
        self.answer_by = Some(Instant::now() + silence);
        match self.decode.send(Call::Advance(Advance { reservation, epoch })) {
            true => Ok(()),
            false => Err(Ending::Elsewhere("decode_lost")),
        }
    }

    fn request(
        &self,
        reservation: u64,
        epoch: u32,
        present: u32,
        accepted: Vec<u32>,
        forced: Option<u32>,
    ) -> PrefillRequest {
        let mut sequence = self.life.path.sequence().clone();
        let position = sequence.tokens.len() as u32 - u32::from(forced.is_some());
        sequence.tokens.truncate(position as usize);
        let decode = &self.slot.member;
        PrefillRequest {
            sequence: Some(sequence),
            reservation,
            epoch,
            decode_address: decode.address.clone(),
            decode_layout: decode.layout_fingerprint,
            decode_weights: decode.weights_fingerprint,
            blocks_present: present,
            blocks_accepted: accepted,
            forced: forced.map(|id| Token { id, position, ..Token::default() }),
            member: String::new(),
        }
    }

    /// Asks the member that we hold a credit for, or queues for another.
    async fn ask(&mut self, request: PrefillRequest) -> Result<(), Ending> {
        let Some(credit) = &self.credit else {
            let ticket = self.life.queue(Some(&self.slot.member.id))?;
            self.ticket = Some((ticket, request));
            return Ok(());
        };
        let member = credit.member.clone();
        match self.life.peer(&member) {
            Ok(peer) => {
                let request = PrefillRequest { member: member.id.clone(), ..request };
                self.life.meter.lap(PartName::Reservation, Place::Router);
                self.prefill = Some(prefill(peer, request));
            }
            Err(failure) => {
                self.life.blame(&member, &failure)?;
                return Err(Ending::Elsewhere("prefill_lost"));
            }
        }
        Ok(())
    }

    /// The decode worker keeps these blocks in its prefix cache for a while.
    fn remember(&self) {
        self.life.shared.cluster.remember(&self.slot.member.id, &self.life.path.sequence().tokens);
    }

    fn protocol(&self, what: &str) -> Ending {
        self.life.shared.metrics.violation();
        let message = format!(
            "protocol violation between router and workers: {what} (decode worker {})",
            self.slot.member.id
        );
        Ending::Failed(Error::new(ErrorCode::Internal, message))
    }
}

/// The reservation is given up, not the request, unless its time is over.
fn no_credit(error: Error) -> Ending {
    match error.code() {
        ErrorCode::Deadline => Ending::Failed(error),
        _ => Ending::Elsewhere("prefill_lost"),
    }
}

async fn next(prefill: &mut Option<Listening<PrefillEvent>>) -> Result<PrefillEvent, Failure> {
    match prefill {
        Some(prefill) => prefill.next().await,
        None => pending().await,
    }
}

async fn offer(ticket: &mut Option<(Ticket, PrefillRequest)>) -> Result<Offer, Error> {
    match ticket {
        Some((ticket, _)) => ticket.offer().await,
        None => pending().await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
