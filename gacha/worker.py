"""One agent at work: it takes runs in its turn, starts them, sees them end, until the sweep has none left for it."""

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import console
from gacha import board, hyperband, locks, process, search
from gacha.board import Board, say
from gacha.definition import Sweep
from gacha.follow import Follower
from gacha.ledger import Ledger, Pull
from gacha.locks import Card, Hold, send, turn
from gacha.pack import Pack, place, plan

POLL_SECONDS, LOOK_SECONDS = 0.05, 1.0  # between looks at one's own processes, and at what the others have done
JUDGE_SECONDS = 5.0  # between decisions on early termination, as the real agent asks for them
LINGER_SECONDS = 600.0
"""How long an agent without work waits for runs of others, to take up what a dying one leaves; then it frees its
machine, which a job on a cluster pays for."""
FLAPPING_SECONDS, FLAPPING_FAILURES, INITIAL_FAILURES = 60, 3, 5  # the real agent's
MOST_PLANNED = 2_000  # more runs do not change the size of a pack


@dataclass
class Worker:
    """What one agent knows and has in hand."""

    sweep: Sweep
    ledger: Ledger
    card: Card
    follower: Follower
    most: int
    """Most runs in a process."""
    count: int | None
    """Most runs that it starts."""
    delay: float
    """Seconds between SIGTERM and SIGKILL."""
    running: list[Pack] = field(default_factory=list)
    again: deque[Pack] = field(default_factory=deque)
    """Parts of packs that were too large."""
    taken: set[str] = field(default_factory=set)
    """Runs that it has ever taken."""
    fragments: dict[str, int] = field(default_factory=dict)
    """How many W&B files a run had before its last attempt."""
    deadlines: dict[str, float] = field(default_factory=dict)
    """When runs that early termination has named are killed."""
    target: str = ""
    """The run that has reached the metric's target: none is started any more."""
    began: float = field(default_factory=time.monotonic)
    ended: int = 0
    failed: int = 0
    """Processes that have failed."""

    def seen(self) -> list[search.Seen]:
        """All runs as search and early termination look at them."""
        pulls = self.ledger.pulls
        return [search.Seen(p.run_id, p.params, p.status, self.follower.history(p.run_id)) for p in pulls]

    def look(self) -> dict[str, Card]:
        """See, in one's turn, what others have done; the agents that live."""
        self.ledger.read()
        cards = locks.cards(self.ledger.folder)
        self.ledger.look(cards, self.card.machine)
        return cards

    def neighbours(self, cards: dict[str, Card]) -> list[Card]:
        """The others with which this one shares devices or cores."""
        return [card for card in cards.values() if card.name != self.card.name and card.shares(self.card)]

    def others(self) -> list[Pull]:
        """Runs that somebody else has in hand."""
        return [p for p in self.ledger.pulls if p.agent not in ("", self.card.name) and not p.ready]

    def take(self) -> Pack | None:
        """The next runs, taken in one's turn: no other agent can take them. None: there is nothing to take now."""
        if self.again:
            pack: Pack | None = self.again.popleft()
        else:
            if not self.sweep.listed or "target" in self.sweep.definition.get("metric", {}):
                self.seen()  # reads the files before the turn, in which the others wait
            with turn(self.ledger.folder):
                pack = self.choose(self.look())
                for pull in pack.pulls if pack else []:
                    self.ledger.write(pull, "assigned", params=pull.params)
        if pack:
            self.taken |= {pull.run_id for pull in pack.pulls}
            pack.slot = min(set(self.card.slots) - {other.slot for other in self.running})
            here = ("", self.card.machine)
            pack.holds = [Hold(p.lock, p.pid if p.machine in here else None, self.delay) for p in pack.pulls]
        return pack

    def choose(self, cards: dict[str, Card]) -> Pack | None:
        """Which runs to take next."""
        left = len(self.ledger.pulls) + 1 if self.count is None else self.count - len(self.taken)
        pulls = [p for p in self.ledger.pulls if p.ready and p.status in ("waiting", "interrupted")]
        if left <= 0:
            pulls = [pull for pull in pulls if pull.run_id in self.taken]
        if "target" in self.sweep.definition.get("metric", {}) and (best := search.reached(self.sweep, self.seen())):
            self.target = best.run_id
            return None
        if pulls and self.most == 1:
            return Pack([min(pulls, key=place)])
        if pulls:
            jobs = sum(card.jobs for card in cards.values())
            # Its own by what it has in hand: what it took a moment ago does not run yet.
            theirs = Counter((p.agent, p.pid) for p in self.others() if p.status == "running")
            sizes = [len(pack.open) or len(pack.pulls) for pack in self.running] + list(theirs.values())
            pulls = sorted(pulls, key=place)[:MOST_PLANNED]
            pack = plan(pulls, jobs, self.most, sizes[:jobs])[0]
            return Pack(pack.pulls[: max(left, 1)])
        if self.sweep.listed or left <= 0:
            return None
        params = search.propose(self.sweep, self.seen())
        return None if params is None else Pack([self.ledger.propose(params)])

    def is_done(self, seconds: float) -> bool:
        """Whether to leave, having had nothing to do for `seconds`: it stays for what others may leave."""
        others = self.others()
        if not others or self.target or (self.count is not None and len(self.taken) >= self.count):
            return True
        if not seconds:
            names = ", ".join(sorted({pull.agent for pull in others}))
            say(f"waiting for {len(others)} run(s) of {names}, to take up what is left of them")
        return seconds > LINGER_SECONDS

    def begin(self, shown: Board) -> None:
        """Start what was taken and whose locks are free by now."""
        for pack in [pack for pack in self.running if not pack.child]:
            if sum(hold.poll() for hold in pack.holds) < len(pack.holds):
                continue
            if pack.pulls[0].stopping:  # named by early termination, left by a dying agent, and ended now
                pack.release()
                self.running.remove(pack)
                with turn(self.ledger.folder):
                    self.ledger.read()
                    self.ledger.write(pack.pulls[0], "ended", status="stopped", returncode=None, seconds=0.0)
                continue
            for pull in pack.pulls:
                self.fragments[pull.run_id] = len(self.follower.fragments(pull.run_id))
            process.prepare(self.sweep, pack)
            with turn(self.ledger.folder):
                neighbours = [card for name, card in self.look().items() if name != self.card.name]
                neighbours = [card for card in neighbours if card.shares(self.card)]
                process.start(self.sweep, pack, self.ledger, self.card, neighbours)
            beside = "" if pack.alone else f"  (one of {len(pack.pulls)} in process {pack.pid})"
            for pull in pack.pulls:
                shown.tell(pull, f"started  {shown.label(pull)}{beside}")

    def reap(self, pack: Pack, shown: Board) -> str:
        """Take note of runs of `pack` that have ended; why to give up, or nothing."""
        code = pack.poll()  # before its news: after them, some could come unread
        over = self.settle(pack.told_ends())
        if code is not None:
            self.running.remove(pack)
            if code in (console.EXIT_USER, -signal.SIGKILL) and pack.open and not pack.alone:
                # Refused by the stage or killed by the system: too large together, or one run's mistake.
                say(f"{len(pack.open)} runs ended together, served in smaller parts: {pack.last_error()}")
                self.again.extendleft(reversed(pack.halves()))
            over += self.settle(pack.ends_with(code))
        for pull in over:
            line = (board.last_error if pull.status == "failed" else board.last_line)(pull.log, pull.log_from)
            again = "  preempted: to be run again" if pull.ready and pull.status == "interrupted" else ""
            shown.tell(pull, f"{pull.status}  {board.clock(pull.seconds)}  {line}{again}")
        verdict = ""
        if failures := [pull for pull in over if pull.status == "failed"]:
            # As the real agent, except that a diverged run (exit 3) or an interrupted one (143) does not count here:
            # the first is a result that we came for, the second no fault of the run. Runs that fail with their process
            # fail once.
            self.failed += 1
            line = board.last_error(failures[0].log, failures[0].log_from)
            verdict = flapping(self.failed, self.ended, time.monotonic() - self.began, line)
        self.ended += len(over)
        return verdict

    def settle(self, ends: list[tuple[Pull, int]], leaving: bool = False) -> list[Pull]:
        """Record that runs have ended, each with its exit code; `leaving`: because this agent is being stopped."""
        told = []
        for pull, code in ends:
            failed = code not in (0, console.EXIT_DIVERGED) and not (leaving or pull.stopping)
            new = failed and len(self.follower.fragments(pull.run_id)) > self.fragments.get(pull.run_id, 0)
            # Of this attempt: one that died before its wandb.init has no file of its own.
            preempting = new and self.follower.preempting(pull.run_id)
            told.append((preempting, self.follower.step(pull.run_id) if preempting else None))
        if ends:
            with turn(self.ledger.folder):
                self.ledger.read()
                for (pull, code), (preempting, step) in zip(ends, told, strict=True):
                    self.ledger.settle(pull, code, leaving, preempting, step)
        return [pull for pull, _ in ends]

    def judge(self, shown: Board) -> None:
        """Ask those of its runs to end that early termination names; they are not resumed."""
        named = hyperband.to_stop(self.sweep.definition, self.seen()) - self.deadlines.keys()
        for pack in self.running:
            pull = pack.pulls[0]
            if pack.child and pull.run_id in named:
                with turn(self.ledger.folder):
                    self.ledger.read()
                    self.ledger.write(pull, "stopping")
                self.deadlines[pull.run_id] = time.monotonic() + self.delay
                send(pack.pid, signal.SIGTERM)
                shown.tell(pull, "stopping  early_terminate: not among the best")

    def stop(self, caught: list[tuple[int, float]]) -> None:
        """Ask its processes to save and end, kill them after the delay or a second Ctrl-C, and record it."""
        alive = [pack for pack in self.running if pack.child]
        for pack in self.running:
            pack.release()
        for pack in alive:
            send(pack.pid, signal.SIGTERM)
        if alive:
            runs = sum(len(pack.open) for pack in alive)
            say(f"stopping {runs} run(s): up to {self.delay:.0f} s to save, Ctrl-C again kills")
        until = time.monotonic() + self.delay
        while any(pack.poll() is None for pack in alive):
            # Two at once are one: `timeout` and some terminals signal both the process and its group.
            again = any(signum == signal.SIGINT and when > caught[0][1] + 1 for signum, when in caught)
            if again or time.monotonic() > until:
                for pack in alive:
                    send(pack.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        for pack in alive:
            self.settle(pack.told_ends(), leaving=True)
            self.settle(pack.ends_with(pack.poll() or 0), leaving=True)


def serve(work: Worker, check: Callable[[Pack], None]) -> int:
    """Run what is left, as many processes at once as `work` has slots, until a signal comes or runs keep failing.

    `check` is asked of the first point of a search before it starts. Returns 0, 1 (gave up) or 128 + signal.
    """
    caught: list[tuple[int, float]] = []  # signal, time.monotonic()
    # A hangup that nohup made harmless stays so; Ctrl-C is heard even where a script's `&` had it ignored.
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heard.append(signal.SIGHUP)

    def catch(signum: int, _: object) -> None:
        caught.append((signum, time.monotonic()))

    before = {signum: signal.signal(signum, catch) for signum in heard}
    verdict, looked, judged, idle = "", -LOOK_SECONDS, time.monotonic(), None
    judges = "early_terminate" in work.sweep.definition
    try:
        with Board(work.ledger) as shown:
            while not caught and not verdict:
                ended = work.ended
                for pack in [pack for pack in work.running if pack.child]:
                    verdict = verdict or work.reap(pack, shown)
                now = time.monotonic()
                if judges and now > judged + JUDGE_SECONDS:
                    work.judge(shown)
                    judged = now
                for pack in work.running:
                    if now > work.deadlines.get(pack.pulls[0].run_id, now):
                        send(pack.pid, signal.SIGKILL)
                if work.ended > ended or now > looked + LOOK_SECONDS:
                    looked = now
                    taken: Pack | None = None
                    while len(work.running) < work.card.jobs and not caught and not verdict:
                        if (taken := work.take()) is None:
                            break
                        work.running.append(taken)  # before it starts: what fails half-way is stopped too
                        if not work.sweep.listed and taken.pulls[0].index == 0:
                            check(taken)
                    if taken:
                        with turn(work.ledger.folder):
                            work.look()
                    if not work.running and not verdict:
                        idle = idle or now
                        if work.is_done(now - idle):
                            break
                    else:
                        idle = None
                work.begin(shown)
                shown.tick()
                time.sleep(POLL_SECONDS)
    finally:
        work.stop(caught)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if verdict:
        say(f"error: {work.sweep.path}: {verdict}")
        return 1
    return 128 + caught[0][0] if caught else 0


def flapping(failed: int, ended: int, seconds: float, line: str) -> str:
    """Why to give up after the `failed`-th failure, `ended` runs having ended by then; empty to go on."""
    watched = os.environ.get("WANDB_AGENT_DISABLE_FLAPPING") != "true"
    if watched and seconds < FLAPPING_SECONDS and failed >= FLAPPING_FAILURES:
        return f"{failed} runs failed within {FLAPPING_SECONDS} s, the sweep stops: {line}"
    text = os.environ.get("WANDB_AGENT_MAX_INITIAL_FAILURES", "")
    if failed >= ended and failed >= (int(text) if text.isdecimal() else INITIAL_FAILURES):
        return f"the first {failed} runs failed, the sweep stops: {line}"
    return ""
