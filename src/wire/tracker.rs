//! Which replies a server still owes, and to whom: the client, or the proxy itself.
//!
//! Every frame sent to the server that will be answered is noted, in order; every terminal reply
//! takes one note off. From that follow where a session stands (idle, or in the middle of
//! something), and which replies the client must not see. Pure: kinds in, facts out.
//!
//! The surprises, all after Postgres' `PostgresMain` and `CopyGetData`:
//! - an error of an extended message makes the server skip everything up to the next Sync, simple
//!   queries included;
//! - an error of a Query or of a Sync (a failing commit) is followed by ReadyForQuery anyway;
//! - while a COPY FROM STDIN reads, Sync and Flush are ignored, also those that came before the
//!   client could know (libpq sends Execute and Sync together, and Sync again after the data).

use std::collections::VecDeque;

use super::backend::Status;

/// A request whose reply is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Parse,
    Bind,
    Describe,
    Execute,
    Close,
    Sync,
    /// Answered by anything, then ReadyForQuery.
    Query,
    /// Answered by FunctionCallResponse, then ReadyForQuery.
    Function,
    /// CopyDone or CopyFail: not answered, but it ends a COPY that began before it.
    CopyEnd,
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Client,
    /// One statement of a client's Query that is run by itself: replies are translated.
    Step,
    /// The proxy, on its own account: replies are not for the client.
    Hook,
}

/// What is special about a request of the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mark {
    #[default]
    None,
    /// The client may hear of its success only when what follows it has succeeded too.
    Withheld,
    /// Its answer is shown to an observer.
    Observed,
    /// What came of it is noted for its transaction's rehearsal.
    Rehearsed,
}

impl Mark {
    /// This one, or another where this is none.
    pub fn or(self, other: Self) -> Self {
        if self == Self::None { other } else { self }
    }
}

/// One awaited reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Awaited {
    pub request: Request,
    pub owner: Owner,
    pub mark: Mark,
    /// Said of it by [`Tracker::next_may_write`].
    pub may_write: bool,
}

/// What a server's frame answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// What was being answered; `None` for what comes at any moment, or unasked.
    pub to: Option<Awaited>,
    /// This frame was the last one of the answer.
    pub terminal: bool,
}

/// More than this many awaited replies, and no more is read from the client: far more than a
/// server can hold back in its own buffer (8 kB), so waiting for it cannot deadlock.
const PIPELINE_MAX: usize = 16_384;
/// Room for notes that an idle session keeps.
const KEPT_CAPACITY: usize = 32;

#[derive(Debug, Default)]
pub struct Tracker {
    awaited: VecDeque<Awaited>,
    status: Status,
    /// Extended messages have gone out since the last Sync: a transaction may be open.
    unsynced: bool,
    /// After an error the server ignores what comes, up to a Sync.
    skipping: bool,
    /// The server reads COPY data and ignores Sync and Flush.
    copy_in: bool,
    next_may_write: bool,
}

impl Tracker {
    pub const fn status(&self) -> Status {
        self.status
    }

    pub const fn copy_in(&self) -> bool {
        self.copy_in
    }

    /// Nothing awaited, nothing unsynced, no transaction open.
    pub fn idle(&self) -> bool {
        self.at_rest() && matches!(self.status, Status::Idle)
    }

    /// Nothing awaited and nothing unsynced; a transaction may be open.
    pub fn at_rest(&self) -> bool {
        self.awaited.is_empty() && !self.unsynced && !self.skipping && !self.copy_in
    }

    /// Whether the last that was sent ended a transaction, unless one is open explicitly.
    pub const fn at_sync(&self) -> bool {
        !self.unsynced && !self.skipping && !self.copy_in
    }

    /// Everything asked has been answered (a Sync may still be owed by the sender).
    pub fn answered(&self) -> bool {
        self.awaited.is_empty()
    }

    /// How many requests with this mark are to be answered.
    pub fn awaited_with(&self, mark: Mark) -> usize {
        self.awaited.iter().filter(|awaited| awaited.mark == mark).count()
    }

    /// Whether the answer to a request with [`Mark::Withheld`] is still to come.
    pub fn awaits_withheld(&self) -> bool {
        self.awaited.iter().any(|awaited| awaited.mark == Mark::Withheld)
    }

    pub const fn skipping(&self) -> bool {
        self.skipping
    }

    pub fn full(&self) -> bool {
        self.awaited.len() >= PIPELINE_MAX
    }

    /// The next frame that is noted may write.
    pub const fn next_may_write(&mut self) {
        self.next_may_write = true;
    }

    /// Whether anything that may write was asked behind the next ReadyForQuery.
    pub fn writes_beyond_ready(&self) -> bool {
        self.awaited
            .iter()
            .skip_while(|awaited| !matches!(awaited.request, Request::Sync | Request::Query | Request::Function))
            .skip(1)
            .any(|awaited| awaited.may_write)
    }

    /// Whether the server will say ReadyForQuery right behind the reply that is awaited, without
    /// hearing more from the client.
    pub fn ready_follows(&self) -> bool {
        let mut awaited = self
            .awaited
            .iter()
            .filter(|awaited| awaited.request != Request::CopyEnd)
            .map(|awaited| awaited.request);
        match awaited.next() {
            // Or another statement of the Query.
            Some(Request::Query) => true,
            Some(Request::Execute) => awaited.next() == Some(Request::Sync),
            _ => false,
        }
    }

    /// How many times ReadyForQuery is still to come.
    pub fn readies(&self) -> usize {
        self.awaited_of(|request| matches!(request, Request::Sync | Request::Query | Request::Function))
    }

    /// Whether all that is under way is one Query, or one Execute (with what belongs to it) up to its
    /// Sync, of the client's, outside transactions.
    pub fn is_one_statement(&self) -> bool {
        let of_client = self.awaited.iter().all(|awaited| awaited.owner == Owner::Client);
        let runs = self.awaited_of(|request| matches!(request, Request::Query | Request::Execute));
        let once = |request| self.awaited_of(|other| other == request) <= 1;
        self.at_sync()
            && of_client
            && (self.readies(), runs) == (1, 1)
            && self.awaited_of(|request| request == Request::Function) == 0
            && once(Request::Parse)
            && once(Request::Bind)
            && matches!(self.status, Status::Idle)
    }

    /// Whether a Parse is still to be answered.
    pub fn awaits_parse(&self) -> bool {
        self.awaited_of(|request| request == Request::Parse) > 0
    }

    fn awaited_of(&self, wanted: impl Fn(Request) -> bool) -> usize {
        self.awaited.iter().filter(|awaited| wanted(awaited.request)).count()
    }

    /// The request that the next reply answers.
    pub fn front(&self) -> Option<Awaited> {
        self.awaited
            .iter()
            .find(|awaited| awaited.request != Request::CopyEnd)
            .copied()
    }

    /// Notes a client's frame that goes to the server.
    pub fn sent(&mut self, kind: u8) {
        self.note(kind, Owner::Client, Mark::None);
    }

    /// Notes a frame that goes to the server, with what is special about it.
    pub fn note(&mut self, kind: u8, owner: Owner, mark: Mark) {
        let request = match kind {
            b'P' => Request::Parse,
            b'B' => Request::Bind,
            b'D' => Request::Describe,
            b'E' => Request::Execute,
            b'C' => Request::Close,
            b'S' => Request::Sync,
            b'Q' => Request::Query,
            b'F' => Request::Function,
            b'c' | b'f' => Request::CopyEnd,
            // CopyData, Flush and Terminate are not answered.
            _ => return,
        };
        if self.copy_in {
            if request == Request::CopyEnd {
                self.copy_in = false;
            }
            return;
        }
        if self.skipping {
            if request != Request::Sync {
                return;
            }
            self.skipping = false;
        }
        match request {
            Request::CopyEnd if self.awaited.is_empty() => return,
            Request::CopyEnd => {}
            Request::Sync | Request::Query | Request::Function => self.unsynced = false,
            _ => self.unsynced = true,
        }
        let may_write = std::mem::take(&mut self.next_may_write);
        self.awaited.push_back(Awaited {
            request,
            owner,
            mark,
            may_write,
        });
    }

    /// Takes note of a server's frame; `body` is looked at for ReadyForQuery only.
    pub fn received(&mut self, kind: u8, body: &[u8]) -> Reply {
        match kind {
            // Frequent, and never terminal.
            b'D' | b'd' => Reply {
                to: self.front(),
                terminal: false,
            },
            // Notice, ParameterStatus, NotificationResponse: at any moment.
            b'N' | b'S' | b'A' => Reply {
                to: None,
                terminal: false,
            },
            b'Z' => {
                self.status = Status::read(body);
                self.pop_through_ready()
            }
            b'E' => self.error(),
            b'G' => self.copy_in_begins(),
            _ => {
                let to = self.front();
                let terminal = to.is_some_and(|awaited| match awaited.request {
                    Request::Parse => kind == b'1',
                    Request::Bind => kind == b'2',
                    Request::Close => kind == b'3',
                    Request::Describe => matches!(kind, b'T' | b'n'),
                    Request::Execute => matches!(kind, b'C' | b'I' | b's'),
                    Request::Sync | Request::Query | Request::Function | Request::CopyEnd => false,
                });
                if terminal {
                    self.pop();
                }
                Reply { to, terminal }
            }
        }
    }

    fn pop(&mut self) -> Option<Awaited> {
        while let Some(awaited) = self.awaited.pop_front() {
            if awaited.request != Request::CopyEnd {
                self.give_back();
                return Some(awaited);
            }
        }
        None
    }

    /// A burst's memory is not kept by a session that has become quiet.
    fn give_back(&mut self) {
        if self.awaited.is_empty() && self.awaited.capacity() > KEPT_CAPACITY {
            self.awaited = VecDeque::new();
        }
    }

    fn pop_through_ready(&mut self) -> Reply {
        let mut to = None;
        while let Some(awaited) = self.pop() {
            if matches!(awaited.request, Request::Sync | Request::Query | Request::Function) {
                to = Some(awaited);
                break;
            }
        }
        self.drop_markers();
        self.copy_in = false;
        Reply { to, terminal: true }
    }

    /// Markers of a COPY that is over mean nothing.
    fn drop_markers(&mut self) {
        while self
            .awaited
            .front()
            .is_some_and(|awaited| awaited.request == Request::CopyEnd)
        {
            self.awaited.pop_front();
        }
    }

    fn error(&mut self) -> Reply {
        self.copy_in = false;
        let to = self.front();
        let Some(awaited) = to else {
            return Reply { to, terminal: false };
        };
        if matches!(awaited.request, Request::Sync | Request::Query | Request::Function) {
            return Reply { to, terminal: false };
        }
        while self
            .awaited
            .front()
            .is_some_and(|awaited| awaited.request != Request::Sync)
        {
            self.awaited.pop_front();
        }
        self.skipping = self.awaited.is_empty();
        self.give_back();
        Reply { to, terminal: true }
    }

    fn copy_in_begins(&mut self) -> Reply {
        self.drop_markers();
        let to = self.front();
        while let Some(awaited) = self.awaited.get(1) {
            match awaited.request {
                Request::Sync => {
                    self.awaited.remove(1);
                    self.unsynced = true;
                }
                Request::CopyEnd => {
                    self.awaited.remove(1);
                    // What came after the data was read as usual.
                    self.unsynced = self
                        .awaited
                        .iter()
                        .rev()
                        .take_while(|awaited| {
                            !matches!(awaited.request, Request::Sync | Request::Query | Request::Function)
                        })
                        .count()
                        > 0;
                    return Reply { to, terminal: false };
                }
                _ => break,
            }
        }
        self.copy_in = true;
        Reply { to, terminal: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `>kinds` are sent by the client, `<kinds` received; Z's status stands behind it. Returns
    /// what is left.
    fn run(script: &str) -> Tracker {
        let mut tracker = Tracker::default();
        for word in script.split_whitespace() {
            let (direction, kinds) = word.split_at(1);
            let mut kinds = kinds.bytes();
            while let Some(kind) = kinds.next() {
                if direction == ">" {
                    tracker.sent(kind);
                } else if kind == b'Z' {
                    let status = kinds.next().unwrap();
                    tracker.received(kind, &[status]);
                } else {
                    tracker.received(kind, b"");
                }
            }
        }
        tracker
    }

    #[test]
    fn when_a_session_is_idle() {
        for (script, idle) in [
            ("", true),
            (">Q", false),
            (">Q <TDDC", false),
            (">Q <TDDCZI", true),
            (">Q <CZT", false),
            (">Q <CZT >Q <EZE >Q <CZI", true),
            (">Q <TDCTDCZI", true),
            (">QQ <CZI", false),
            (">QQ <CZI <CZI", true),
            // Extended, with Sync and with Flush only.
            (">PBDES <12nCZI", true),
            (">PBDEH <12nC", false),
            (">PBDEH <12nC >S <ZI", true),
            (">PDS <1tTZI", true),
            (">BES <2DsZI", true),
            (">PBESPBES <12CZI", false),
            (">PBESPBES <12CZI12CZI", true),
            // Errors skip to the Sync, those before and those after the error.
            (">PBES <1EZI", true),
            (">PBESPBES <1EZI12CZI", true),
            (">PB <E >ES <ZI", true),
            (">PB <E >EQ", false),
            (">PB <E >EQS <ZI", true),
            // A failing commit at Sync.
            (">PBES <12CEZI", true),
            // A query in the middle of an unsynced batch ends its transaction.
            (">PBE <12C >Q <CZI", true),
            // COPY by a Query; errors and data that comes too late.
            (">Q <G >dddc <CZI", true),
            (">Q <G >dS <EZI", true),
            (">Q <G >d <EZI >ddc", true),
            (">Q <G >dSHdc <CZI", true),
            (">Q <H <dddcCZI", true),
            // COPY by the extended protocol, with the early Sync of libpq.
            (">PBDES <12nG >ddc", false),
            (">PBDES <12nG >ddcS <CZI", true),
            (">PBDES <12nG >d <E >dcS <ZI", true),
            (">PBDES <12nG >dcS <EZI", true),
            (">PBDEddcS <12nGCZI", true),
            (">PBDEddcSPBES <12nGCZI <12CZI", true),
            (">PBDEddcPBES <12nGC12CZI", true),
            // Function calls, and what comes at any moment.
            (">F <VZI", true),
            ("<NSA", true),
            (">Q <NTADSCZI", true),
        ] {
            let tracker = run(script);
            assert_eq!(tracker.idle(), idle, "{script}: {tracker:?}");
        }
    }

    #[test]
    fn replies_know_who_asked() {
        use Owner::{Client, Hook};
        let mut tracker = Tracker::default();
        tracker.sent(b'B');
        tracker.note(b'E', Client, Mark::Withheld);
        for kind in *b"PBEC" {
            tracker.note(kind, Hook, Mark::None);
        }
        tracker.sent(b'S');
        let owners: Vec<_> = b"2C12DC3Z"
            .iter()
            .map(|&kind| {
                tracker
                    .received(kind, b"I")
                    .to
                    .map(|awaited| (awaited.owner, awaited.mark == Mark::Withheld))
            })
            .collect();
        let expected = [
            (Client, false),
            (Client, true),
            (Hook, false),
            (Hook, false),
            (Hook, false),
            (Hook, false),
            (Hook, false),
            (Client, false),
        ];
        assert_eq!(owners, expected.map(Some));
        assert!(tracker.idle());
    }

    #[test]
    fn an_error_of_the_hook_skips_to_the_sync() {
        let mut tracker = Tracker::default();
        tracker.sent(b'E');
        for kind in *b"PBEC" {
            tracker.note(kind, Owner::Hook, Mark::None);
        }
        tracker.received(b'C', b"");
        tracker.received(b'1', b"");
        tracker.received(b'2', b"");
        let reply = tracker.received(b'E', b"");
        assert_eq!(reply.to.map(|awaited| awaited.owner), Some(Owner::Hook));
        assert!(tracker.skipping());
        tracker.sent(b'S');
        tracker.received(b'Z', b"I");
        assert!(tracker.idle());
    }
}
