"""One scheduler of a multiprocessor, as far as a loop's machine code tells: warps that issue in order, pipes, shared
memory, tensor core.

A block's warpgroups have one warp on each of the four schedulers, which are taken to run in step. So one scheduler is
simulated, with a warp of each warpgroup, and whatever the four share is four times as slow. `model_sass.py` says what
is assumed, and what this is for.
"""
import random
from collections import deque
from dataclasses import dataclass

EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction, as the machine sees it."""

    stall: int = 1
    waits: tuple = ()
    writes: int | None = None
    reads: int | None = None
    pipe: str = ""  # "" for none
    cycles: float = 1  # that it keeps its pipe busy
    latency: float = 0  # from its pipe to its result
    wavefronts: float = 0  # of shared memory, for all four schedulers
    matmul: tuple = ()  # of a warpgroup: cycles of the tensor cores, cycles of shared memory for its operands
    commits: bool = False  # ends a group of matmuls
    groups: int | None = None  # waits until at most so many groups are unfinished
    barrier: str = ""  # "sync" waits for another warpgroup's "arrive"


class Tensor:
    """The tensor core, and the shared memory that its operands come from. Loads of threads go first; one matmul's
    operands may be fetched while its predecessor runs. `background`: the share of shared memory's cycles that the copy
    engine takes."""

    def __init__(self, background):
        self.now, self.busy, self.rate = 0.0, 0.0, 1 - background
        self.queue, self.finished, self.started = deque(), {}, 0

    def load(self, at, cycles):
        """When a load that comes now has its data."""
        self.advance(at)
        self.busy = max(self.busy, at) + cycles / self.rate
        return self.busy

    def start(self, at, tensor, shared):
        self.advance(at)
        self.started += 1
        self.queue.append([tensor, shared, self.started])
        return self.started

    def target(self):
        """Whose operands are being fetched."""
        if self.queue and self.queue[0][1] > EPSILON:
            return self.queue[0]
        return self.queue[1] if len(self.queue) > 1 and self.queue[1][1] > EPSILON else None

    def next_event(self):
        """How long until something changes if no load comes."""
        if self.now < self.busy - EPSILON:
            waits = [self.busy - self.now]
        elif target := self.target():
            waits = [target[1] / self.rate]
        else:
            waits = []
        if self.queue and self.queue[0][0] > EPSILON:
            waits.append(self.queue[0][0])
        return min(waits, default=float("inf"))

    def advance(self, to):
        while self.now < to - EPSILON:
            step = min(self.next_event(), to - self.now)
            if self.queue:
                target = self.target()
                if target and self.now >= self.busy - EPSILON:
                    target[1] -= step * self.rate
                self.queue[0][0] -= step
            self.now += step
            if self.queue and self.queue[0][0] <= EPSILON and self.queue[0][1] <= EPSILON:
                self.finished[self.queue.popleft()[2]] = self.now


class Warp:
    def __init__(self, steps, start):
        self.steps, self.at, self.ready = steps, 0, start
        self.bound = start  # when its next instruction may issue, as far as the warp itself goes
        self.boards = [0.0] * 6
        self.groups = []  # the last matmul of each group
        self.ends = []  # of its iterations
        self.arrivals = 0


class Scheduler:
    """`greedy`: of two ready warps the one that issued last goes on, else the other. `drain`: cycles from a matmul's
    end to its result. `ahead`: iterations that a warp may be ahead of another, as buffers are few. `jitter`: each
    iteration starts up to so many cycles late, by chance, so that two warps keep a phase only if it is stable."""

    def __init__(self, walks, starts, background=0.0, greedy=True, drain=0.0, ahead=2, jitter=0):
        self.warps = [Warp(steps, start) for steps, start in zip(walks, starts)]
        self.warps[0].arrivals = 1  # whoever orders warpgroups by barriers lets the first one go first
        self.tensor = Tensor(background)
        self.greedy, self.drain, self.ahead, self.jitter = greedy, drain, ahead, jitter
        self.chance = random.Random(0)
        self.pipes, self.slot, self.last = {"": 0.0}, 0.0, 0
        for step in {id(step): step for walk in walks for step in walk}.values():
            self.pipes.setdefault(step.pipe, 0.0)

    def matmuls_done(self, warp, step):
        """When the matmuls that a step waits for have given their results; None: not yet known. They end in the order
        of their start."""
        if len(warp.groups) <= step.groups:
            return 0.0
        end = self.tensor.finished.get(warp.groups[-1 - step.groups])
        return None if end is None else end + self.drain

    def time_of(self, warp):
        """When the warp's next instruction may issue; None: when something happens elsewhere."""
        step = warp.steps[warp.at]
        time = max(warp.bound, self.slot, self.pipes[step.pipe])
        if warp.at == 0 and len(warp.ends) >= min(len(w.ends) for w in self.warps) + self.ahead:
            return None
        if step.barrier == "sync" and not warp.arrivals:
            return None
        if step.groups is not None:
            done = self.matmuls_done(warp, step)
            return None if done is None else max(time, done)
        return time

    def issue(self, number, at):
        warp = self.warps[number]
        step = warp.steps[warp.at]
        self.slot, self.last = at + 1, number
        if step.pipe:
            self.pipes[step.pipe] = at + step.cycles
        if step.writes is not None or step.reads is not None or step.wavefronts:
            self.result(warp, step, at)
        if step.matmul:
            number_of_it = self.tensor.start(at, *step.matmul)
            if step.commits:
                warp.groups.append(number_of_it)
        if step.barrier == "sync":
            warp.arrivals -= 1
        elif step.barrier == "arrive":
            self.warps[(number + 1) % len(self.warps)].arrivals += 1
        warp.at += 1
        if warp.at == len(warp.steps):
            warp.at = 0
            warp.ends.append(at)
            at += self.chance.uniform(0, self.jitter)
        bound = at + max(step.stall, 1)
        for board in warp.steps[warp.at].waits:
            bound = max(bound, warp.boards[board])
        warp.bound = bound

    def result(self, warp, step, at):
        """Scoreboards: when operands are read, and when the result is there."""
        read, result = at + step.cycles, at + step.latency
        if step.wavefronts:
            read = self.tensor.load(at, step.wavefronts)
            result = read + step.latency
        if step.writes is not None:
            warp.boards[step.writes] = max(warp.boards[step.writes], result)
        if step.reads is not None:
            warp.boards[step.reads] = max(warp.boards[step.reads], read)

    def next(self):
        """Issues one instruction, or lets time pass until one may."""
        first, chosen, waiting = float("inf"), None, False
        for number, warp in enumerate(self.warps):
            time = self.time_of(warp)
            if time is None:
                waiting = True
            elif time < first or (time == first and (number == self.last) == self.greedy):
                first, chosen = time, number
        if waiting:
            event = self.tensor.now + self.tensor.next_event()
            if event < first:
                self.tensor.advance(event)
                return
        if chosen is None:
            raise RuntimeError("every warp waits for another")
        self.issue(chosen, first)

    def period(self, iterations, warm_up):
        """Cycles of an iteration, once `warm_up` of them have passed."""
        while min(len(warp.ends) for warp in self.warps) < iterations:
            self.next()
        begin, end = (max(warp.ends[count - 1] for warp in self.warps) for count in (warm_up, iterations))
        done = sum(begin < at <= end for warp in self.warps for at in warp.ends)
        return (end - begin) * len(self.warps) / done
