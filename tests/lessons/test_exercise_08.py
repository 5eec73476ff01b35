"""The grader of lesson 08 diagnoses each wrong answer."""

from pathlib import Path

import grade
import pytest
import steps_08
import torch

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_08.__file__).with_name("08_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all

# ---- step 1: finish_steps ------------------------------------------------------------------------


def static_by(compute):
    """Return an answer whose static ends are compute(arrivals, lengths, slots)."""

    def finish_steps(arrivals, lengths, slots):
        continuous = solutions.finish_steps(arrivals, lengths, slots)[1]
        return compute(arrivals, lengths, slots), continuous

    return finish_steps


def continuous_by(compute):
    def finish_steps(arrivals, lengths, slots):
        static = solutions.finish_steps(arrivals, lengths, slots)[0]
        return static, compute(arrivals, lengths, slots)

    return finish_steps


def right_static(*case):
    return solutions.finish_steps(*case)[0]


def right_continuous(*case):
    return solutions.finish_steps(*case)[1]


def no_arrivals(ends):
    return lambda a, lengths, slots: ends(torch.zeros_like(a), lengths, slots)


def in_groups(take_the_future):
    """Return static ends of batches cut from the list, with requests that have not arrived."""

    def ends(arrivals, lengths, slots):
        found, free = [], 0
        for i in range(0, len(lengths), slots):
            group = arrivals[i : i + slots]
            start = max(free, int(group[0] if take_the_future else group[-1]))
            found += (start + lengths[i : i + slots] - 1).tolist()
            free = start + int(lengths[i : i + slots].max())
        return torch.tensor(found)

    return ends


def ends_of_batches(arrivals, lengths, slots):
    ends = right_static(arrivals, lengths, slots)
    starts = ends - lengths + 1
    return torch.stack([ends[starts == start].max() for start in starts])


def step_by_step(gap, is_static, shortest=False):
    """Return ends by a simulation, with `gap` steps (or -1) between an end and the next request."""

    def ends(arrivals, lengths, slots):
        found, waiting, busy, step = lengths * 0, list(range(len(lengths))), [], 0
        while waiting:
            busy = [end for end in busy if end + gap >= step]
            here = [i for i in waiting if arrivals[i] <= step]
            if shortest:
                here.sort(key=lambda i: int(lengths[i]))
            free = 0 if is_static and busy else slots - len(busy)
            for i in here[:free]:
                found[i] = step + int(lengths[i]) - 1
                busy.append(int(found[i]))
                waiting.remove(i)
            step += 1
        return found

    return ends


def dealt_out(arrivals, lengths, slots):
    free, found = [0] * slots, []
    for i, (arrival, length) in enumerate(zip(arrivals.tolist(), lengths.tolist(), strict=True)):
        free[i % slots] = max(free[i % slots], arrival) + length
        found.append(free[i % slots] - 1)
    return torch.tensor(found)


def without_pauses(arrivals, lengths, slots):
    """Goes on in step 0 although the first request arrives late."""
    shift = int(arrivals[0])
    return right_continuous(arrivals - shift, lengths, slots)


register_all(
    "finish_steps",
    swapped=("static comes first", lambda *case: solutions.finish_steps(*case)[::-1]),
    one_more=("static is one too high", static_by(lambda *case: right_static(*case) + 1)),
    starts=(
        "static is the step in which a request gets its slot",
        static_by(lambda a, lengths, slots: right_static(a, lengths, slots) - lengths + 1),
    ),
    durations=(
        "static counts from the arrival",
        static_by(lambda a, lengths, slots: right_static(a, lengths, slots) - a),
    ),
    no_slots=("static ignores the slots", static_by(lambda a, lengths, slots: a + lengths - 1)),
    one_at_a_time=(
        "static serves one request at a time",
        static_by(lambda a, lengths, slots: right_static(a, lengths, 1)),
    ),
    until_full=("static waits until a batch is full", static_by(in_groups(False))),
    the_future=("static puts requests into a batch that had not", static_by(in_groups(True))),
    batch_ends=("static is the end of the whole batch", static_by(ends_of_batches)),
    both_continuous=("static is that of continuous", static_by(right_continuous)),
    no_arrivals=("static ignores the arrivals", static_by(no_arrivals(right_static))),
    empty_step=("static leaves a step empty", static_by(step_by_step(1, True))),
    overlap=("static begins a batch in the last step", static_by(step_by_step(-1, True))),
    shortest=("static takes the shortest", static_by(step_by_step(0, True, shortest=True))),
    continuous_one_more=(
        "continuous is one too high",
        continuous_by(lambda *case: right_continuous(*case) + 1),
    ),
    both_static=("continuous is that of static", continuous_by(right_static)),
    slot_empty=("continuous leaves a slot empty", continuous_by(step_by_step(1, False))),
    slot_twice=("continuous gives a slot away in the step", continuous_by(step_by_step(-1, False))),
    in_turn=("continuous deals the slots out", continuous_by(dealt_out)),
    continuous_shortest=(
        "continuous takes the shortest",
        continuous_by(step_by_step(0, False, shortest=True)),
    ),
    late=("wrong where the first request arrives late", continuous_by(without_pauses)),
    floats=("must be integers", static_by(lambda *case: right_static(*case).double())),
    shape=("wrong shape", static_by(lambda *case: right_static(*case)[1:])),
)

# ---- step 2: read_in_step ------------------------------------------------------------------------


def loop(price=max, part=lambda needed, budget: max(0, min(needed, budget)), order=lambda x: x):
    """Return an answer by a loop: what a prompt takes from the budget, what is read of it, and the
    order in which the prompts are read."""

    def read_in_step(left, chunk, overhead):
        read = torch.zeros_like(left)
        for i in order(list(range(len(left)))):
            read[i] = part(int(left[i]), chunk)
            if price is max and not read[i]:
                continue
            chunk -= price(int(read[i]), overhead)
        return read

    return read_in_step


def shortest_first(left, chunk, overhead):
    order = left.argsort(stable=True)
    return solutions.read_in_step(left[order], chunk, overhead)[order.argsort()]


def at_least_the_overhead(left, chunk, overhead):
    read = []
    for needed in left.tolist():
        part = max(0, min(max(needed, overhead), chunk)) if needed else 0
        chunk -= max(part, overhead) if part else 0
        read.append(part)
    return torch.tensor(read)


def within_the_overhead(left, chunk, overhead):
    read = []
    for needed in left.tolist():
        read.append(min(needed, chunk) if chunk >= overhead else 0)
        chunk -= max(read[-1], overhead) if read[-1] else 0
    return torch.tensor(read)


def first_alone(left, chunk, overhead):
    read = torch.zeros_like(left)
    read[0] = min(int(left[0]), chunk)
    return read


def ten_prompts(left, chunk, overhead):
    """Looks at ten prompts and no more."""
    read = solutions.read_in_step(left, chunk, overhead)
    return torch.where(torch.arange(len(left)) < 10, read, 0)


def no_division_of_a_prompt(left, chunk, overhead):
    """Cuts a prompt only where it is not the first."""
    read = solutions.read_in_step(left, chunk, overhead)
    return read if left[0] <= chunk else left * (torch.arange(len(left)) == 0)


register_all(
    "read_in_step",
    each_alone=("gives each prompt the whole budget", lambda left, c, o: left.clamp(max=c)),
    evenly=("shares the budget evenly", lambda left, c, o: left.clamp(max=c // len(left))),
    whole=("reads all prompts whole", lambda left, c, o: left.clone()),
    first_alone=("reads the first prompt alone", first_alone),
    no_overhead=("ignores the overhead", lambda left, c, o: solutions.read_in_step(left, c, 1)),
    sum=("takes the tokens and the overhead", loop(lambda n, overhead: (n + overhead) * (n > 0))),
    smaller=("takes the smaller of tokens and overhead", loop(min)),
    more_than_needed=("reads `overhead` tokens of a short prompt", at_least_the_overhead),
    nothing_costs=("lets a prompt that needs nothing", loop(lambda n, overhead: max(n, overhead))),
    all_or_nothing=(
        "reads a prompt whole or not at all",
        loop(part=lambda needed, budget: needed if needed <= budget else 0),
    ),
    early=("stops where less than `overhead`", within_the_overhead),
    shortest=("takes the shortest prompts first", shortest_first),
    last_first=("takes the last prompt first", loop(order=reversed)),
    left=("is what is left afterwards", lambda x, c, o: x - solutions.read_in_step(x, c, o)),
    negative=("becomes negative", loop(part=min)),
    long_prompt=("wrong for a prompt that is longer", no_division_of_a_prompt),
    ten=("wrong for 40 prompts", ten_prompts),
    floats=("must be integers", lambda *case: solutions.read_in_step(*case) / 1),
)

# ---- step 3: draw_tokens -------------------------------------------------------------------------


def drawn(choose):
    """Return an answer that draws one u from each stream: choose(p, u)."""

    def draw_tokens(logits, streams):
        u = torch.stack([steps_08.uniform(stream) for stream in streams])
        return choose(logits.double().softmax(-1), u)

    return draw_tokens


def pick(p, u):
    return (p.cumsum(-1) <= u[:, None]).sum(-1).clamp(max=p.size(1) - 1)


def one_stream(logits, streams):
    u = torch.rand(len(logits), generator=streams[0], dtype=torch.float64)
    return pick(logits.double().softmax(-1), u)


def one_number(logits, streams):
    return pick(logits.double().softmax(-1), steps_08.uniform(streams[0]).expand(len(logits)))


def second_number(logits, streams):
    for stream in streams:
        steps_08.uniform(stream)
    return solutions.draw_tokens(logits, streams)


def in_fp32(logits, streams):
    u = torch.stack([torch.rand((), generator=stream) for stream in streams])
    return pick(logits.double().softmax(-1), u.double())


def by_multinomial(logits, streams):
    """Right in distribution, but it draws in another way."""
    p = logits.double().softmax(-1)
    return torch.cat([torch.multinomial(p[i], 1, generator=s) for i, s in enumerate(streams)])


def of_torch(logits, streams):
    torch.manual_seed(int(streams[0].initial_seed()))  # by chance its numbers are those of a stream
    return pick(logits.double().softmax(-1), torch.rand(len(logits), dtype=torch.float64))


def greedy_two(logits, streams):
    draw_two = [torch.rand(2, generator=stream, dtype=torch.float64)[0] for stream in streams]
    return pick(logits.double().softmax(-1), torch.stack(draw_two))


def stands_still(logits, streams):
    copies = [torch.Generator() for _ in streams]
    for copy, stream in zip(copies, streams, strict=True):
        copy.set_state(stream.get_state())
    return solutions.draw_tokens(logits, copies)


def from_the_seed(logits, streams):
    """Begins anew with each call."""
    for stream in streams:
        stream.manual_seed(stream.initial_seed())
    return solutions.draw_tokens(logits, streams)


def softmax_of_all(logits, streams):
    u = torch.stack([steps_08.uniform(stream) for stream in streams])
    return pick(logits.double().softmax(0), u)


def without_softmax(logits, streams):
    u = torch.stack([steps_08.uniform(stream) for stream in streams])
    return (logits.cumsum(-1) <= u[:, None]).sum(-1).clamp(max=logits.size(-1) - 1)


def ordered(p, u):
    ordered, order = p.sort(-1, descending=True)
    return order.gather(1, pick(ordered, u)[:, None])[:, 0]


def keeps_the_dtype(logits, streams):
    u = torch.stack([steps_08.uniform(stream) for stream in streams])
    return (logits.softmax(-1).cumsum(-1) <= u[:, None]).sum(-1).clamp(max=logits.size(-1) - 1)


def six_streams(logits, streams):
    """Takes the streams of the first rows where they are not as many as rows."""
    return solutions.draw_tokens(logits, sorted(streams, key=lambda s: s.initial_seed()))


register_all(
    "draw_tokens",
    one_stream=("takes all numbers from the first", one_stream),
    one_number=("takes one number for all rows", one_number),
    reversed=(
        "gives each row the stream of another",
        lambda logits, streams: solutions.draw_tokens(logits, streams[::-1]),
    ),
    likeliest=("is the likeliest token", drawn(lambda p, u: p.argmax(-1))),
    one_more=("is one too high", drawn(lambda p, u: (pick(p, u) + 1).clamp(max=p.size(1) - 1))),
    one_less=("is one too low", drawn(lambda p, u: (pick(p, u) - 1).clamp(min=0))),
    from_above=("takes 1 - u", drawn(lambda p, u: pick(p, 1 - u))),
    over_rows=("takes the softmax over the rows", softmax_of_all),
    descending=("in descending order", drawn(ordered)),
    second=("takes the second number", second_number),
    fp32=("draws u in fp32", in_fp32),
    uniform=("ignores the logits", drawn(lambda p, u: pick(torch.full_like(p, 1 / p.size(1)), u))),
    no_softmax=("takes the logits for probabilities", without_softmax),
    torchs=("PyTorch's own random numbers", of_torch),
    two=("takes more from a stream", greedy_two),
    still=("leaves a stream where it was", stands_still),
    anew=("wrong for the same streams again", from_the_seed),
    moved=("wrong where some rows have left", six_streams),
    bfloat16=("wrong for logits of bfloat16", keeps_the_dtype),
    multinomial=(r"the tokens \[\d\] is", by_multinomial),
    shape=("wrong shape", lambda *case: solutions.draw_tokens(*case)[:, None]),
)

# ---- step 4: form_batches ------------------------------------------------------------------------


def bucket(tokens):
    return (int(tokens) - 1).bit_length()


def batches(
    key=lambda m, t: (m, bucket(t)),
    fits=lambda batch, t, most: (len(batch) + 1) * max(*batch, t) <= most,
    goes_on=False,
    in_a_row=False,
    choose=lambda queues: min(queues, key=lambda queue: queue[0]),
):
    """Return an answer that keeps queues of positions, with rules that may be wrong."""

    def form_batches(modality, tokens, max_tokens):
        lengths, result, number = tokens.tolist(), torch.zeros_like(tokens), 0
        queues = {}
        for i, (m, t) in enumerate(zip(modality.tolist(), lengths, strict=True)):
            queues.setdefault(key(m, t), []).append(i)
        while any(queues.values()):
            queue = choose([queue for queue in queues.values() if queue])
            others = sorted(i for q in queues.values() if q is not queue for i in q)
            batch = [queue[0]]
            for i in queue[1:]:
                if in_a_row and any(batch[0] < other < i for other in others):
                    break
                if fits([lengths[j] for j in batch], lengths[i], max_tokens):
                    batch.append(i)
                elif not goes_on:
                    break
            for i in batch:
                result[i] = number
                queue.remove(i)
            number += 1
        return result

    return form_batches


def within_queues(modality, tokens, max_tokens):
    right, seen, result = solutions.form_batches(modality, tokens, max_tokens), {}, []
    for m, t, batch in zip(modality.tolist(), tokens.tolist(), right.tolist(), strict=True):
        numbers = seen.setdefault((m, bucket(t)), {})
        result.append(numbers.setdefault(batch, len(numbers)))
    return torch.tensor(result)


def never_too_long(modality, tokens, max_tokens):
    """Puts inputs that are too long all into one batch."""
    right = solutions.form_batches(modality, tokens, max_tokens)
    alone = tokens > max_tokens
    return torch.where(alone, right[alone].min(), right) if alone.all() else right


def for_two_modalities(modality, tokens, max_tokens):
    return solutions.form_batches(modality.clamp(max=2), tokens, max_tokens)


register_all(
    "form_batches",
    no_modality=("ignores the modality", batches(key=lambda m, t: bucket(t))),
    no_bucket=("ignores the length buckets", batches(key=lambda m, t: m)),
    lower_bucket=("has the buckets 1, 2-3", batches(key=lambda m, t: (m, t.bit_length()))),
    each_length=("has a bucket for each length", batches(key=lambda m, t: (m, t))),
    no_padding=(
        "counts the tokens without the padding",
        batches(fits=lambda batch, t, most: sum(batch) + t <= most),
    ),
    bucket_end=(
        "pads to the end of the bucket",
        batches(fits=lambda batch, t, most: (len(batch) + 1) * 2 ** bucket(t) <= most),
    ),
    pads_to_first=(
        "pads to the first input",
        batches(fits=lambda batch, t, most: (len(batch) + 1) * batch[0] <= most),
    ),
    pads_to_added=(
        "pads to the input that is added",
        batches(fits=lambda batch, t, most: (len(batch) + 1) * t <= most),
    ),
    below=(
        "closes a batch of exactly max_tokens",
        batches(fits=lambda batch, t, most: (len(batch) + 1) * max(*batch, t) < most),
    ),
    too_late=(
        "closes a batch one input too late",
        batches(fits=lambda batch, t, most: len(batch) * max(*batch, t) <= most),
    ),
    goes_on=("goes on after an input that does not fit", batches(goes_on=True)),
    in_a_row=("closes a batch at an input of another queue", batches(in_a_row=True)),
    inputs=("counts inputs", batches(fits=lambda batch, t, most: len(batch) + 1 <= most)),
    whole_queue=("puts a whole queue", batches(fits=lambda batch, t, most: True)),
    alone=("gives each input a batch of its own", lambda m, tokens, n: torch.arange(len(tokens))),
    own_numbers=("numbers the batches of each queue from 0", within_queues),
    queue_by_queue=("computes all batches of one queue", batches(choose=lambda queues: queues[0])),
    longest_queue=(
        "takes the longest queue",
        batches(choose=lambda qs: max(qs, key=lambda q: (len(q), -q[0]))),
    ),
    from_one=("from 1", lambda *case: solutions.form_batches(*case) + 1),
    too_long=("every input alone has more than max_tokens", never_too_long),
    modalities=("wrong for five modalities", for_two_modalities),
    floats=("must be integers", lambda *case: solutions.form_batches(*case).double()),
)

# ---- step 5: cumulative_sums ---------------------------------------------------------------------


def running(update):
    """Return an answer whose sums follow update(sum, score, allowance)."""

    def cumulative_sums(z, allowance):
        total, sums = z[:, 0] * 0, []
        for column in range(z.size(1)):
            total = update(total, z[:, column], allowance)
            sums.append(total)
        return torch.stack(sums, 1)

    return cumulative_sums


def shifted(z, allowance):
    sums = solutions.cumulative_sums(z, allowance)
    return torch.cat([sums[:, :1] * 0, sums[:, :-1]], 1)


def lowest_without_0(z, allowance):
    free = (z - allowance).cumsum(1)
    return free - free.cummin(1)[0]


def first_hundred(z, allowance):
    """Begins anew after 100 scores."""
    parts = z.split(100, dim=1)
    return torch.cat([solutions.cumulative_sums(part, allowance) for part in parts], 1)


def in_float32(z, allowance):
    return solutions.cumulative_sums(z.float(), allowance).to(z.dtype)


register_all(
    "cumulative_sums",
    no_floor=("has no floor", lambda z, a: (z - a).cumsum(1)),
    late_floor=("to 0 only at the end", lambda z, a: (z - a).cumsum(1).clamp(min=0)),
    no_allowance=("lacks the allowance", lambda z, a: solutions.cumulative_sums(z, 0.0)),
    added=("adds the allowance", lambda z, a: solutions.cumulative_sums(z, -a)),
    after_floor=(
        "subtracts the allowance after the floor",
        running(lambda total, score, a: (total + score).clamp(min=0) - a),
    ),
    rising_alone=("leaves out the scores below", lambda z, a: (z - a).clamp(min=0).cumsum(1)),
    falling=("rises while the scores fall", lambda z, a: solutions.cumulative_sums(-z, a)),
    magnitudes=(
        "takes magnitudes of the scores",
        lambda z, a: solutions.cumulative_sums(z.abs(), a),
    ),
    magnitude_of_sum=(
        "takes the magnitude of the sum",
        running(lambda total, score, a: (total + score - a).abs()),
    ),
    before=("is the sum before each score", shifted),
    from_the_first=("begins with 0 after the first score", lowest_without_0),
    one_stream=(
        "goes on from one stream to the next",
        lambda z, a: solutions.cumulative_sums(z.reshape(1, -1), a).reshape(z.shape),
    ),
    over_streams=("runs over the streams", lambda z, a: solutions.cumulative_sums(z.T, a).T),
    highest=(
        "is the highest sum so far",
        lambda z, a: solutions.cumulative_sums(z, a).cummax(1)[0],
    ),
    ceiling=("has a ceiling", running(lambda total, score, a: (total + score - a).clamp(max=0))),
    hundred=("wrong for 300 scores", first_hundred),
    fp32=(r"the sum \[\d, \d\] is", in_float32),
    fp64=("turns float32 into float64", lambda z, a: solutions.cumulative_sums(z.double(), a)),
    shape=("wrong shape", lambda z, a: solutions.cumulative_sums(z, a)[:, 1:]),
)

# ---- step 6: bootstrap_threshold -----------------------------------------------------------------


def streams_by(make, reduce=None):
    """Return an answer that makes streams by make(z, starts, block), and reduces their sums."""

    def bootstrap_threshold(z, starts, block, allowance):
        streams = make(z, starts, block)
        sums = solutions.cumulative_sums(torch.cat([streams, -streams]), allowance)
        return sums.max() if reduce is None else reduce(sums)

    return bootstrap_threshold


def joined(z, starts, block):
    return torch.stack(
        [torch.cat([z.roll(-start)[:block] for start in row]) for row in starts.tolist()]
    )


def of_half(first):
    def reduce(sums):
        half = len(sums) // 2
        return (sums[:half] if first else sums[half:]).max()

    return reduce


def offsets(starts, block):
    return starts[..., None] + torch.arange(block)


def at_most_two(z, starts, block):
    """Takes blocks of one score for one block."""
    return joined(z, starts[:, :1] if block == 1 else starts, block)


register_all(
    "bootstrap_threshold",
    rising=("takes the sums of rising scores alone", streams_by(joined, of_half(True))),
    falling=(
        "wrong where rising scores have the highest sum",
        streams_by(joined, of_half(False)),
    ),
    mean_of_streams=(
        "is the mean over the streams",
        streams_by(joined, lambda s: s.amax(1).mean()),
    ),
    lowest=("is the lowest of the streams'", streams_by(joined, lambda sums: sums.amax(1).min())),
    at_the_end=("at the end of a stream", streams_by(joined, lambda sums: sums[:, -1].max())),
    mean=("is the mean of all sums", streams_by(joined, torch.mean)),
    score=("is the highest score", lambda z, s, b, a: joined(z, s, b).abs().max()),
    apart=(
        "begins each block with a sum of 0",
        streams_by(lambda z, starts, block: joined(z, starts.reshape(-1, 1), block)),
    ),
    one_stream=(
        "joins all streams to one",
        streams_by(lambda z, starts, block: joined(z, starts.reshape(1, -1), block)),
    ),
    no_wrap=(
        "repeats the last score",
        streams_by(lambda z, s, b: z[offsets(s, b).clamp(max=len(z) - 1)].flatten(1)),
    ),
    interleaved=(
        "joins the first scores of all blocks",
        streams_by(lambda z, s, b: z[offsets(s, b).mT % len(z)].flatten(1)),
    ),
    one_score=("takes one score for each block", streams_by(lambda z, starts, block: z[starts])),
    reference=(
        "is the threshold of the reference itself",
        streams_by(lambda z, starts, block: z[None]),
    ),
    backwards=(
        "lets a block end at its start",
        streams_by(lambda z, s, b: z[(offsets(s, b) - b + 1) % len(z)].flatten(1)),
    ),
    no_allowance=(
        "lacks the allowance",
        lambda z, s, b, a: solutions.bootstrap_threshold(z, s, b, 0.0),
    ),
    magnitudes=("takes magnitudes", streams_by(lambda z, s, b: joined(z, s, b).abs())),
    each_stream=("one number for each stream", streams_by(joined, lambda sums: sums.amax(1))),
    single_scores=("wrong for blocks of one score", streams_by(at_most_two)),
    rounded=(
        "the threshold is",
        lambda *case: solutions.bootstrap_threshold(*case).float().to(case[0].dtype),
    ),
    fp64=(
        "turns float32 into float64",
        lambda z, *rest: solutions.bootstrap_threshold(z.double(), *rest),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_08.STEPS, step, message, function)
