import random

from mii_hpc.engine.step import DRAWN, Slice, Step, StepCodec


def any_slices(draw):
    """Slices of one step, the single ones first, as a scheduler may make them."""
    counts = sorted((draw.choice((1, 1, 1, 2, 5)) for _ in range(draw.randrange(9))), key=lambda count: count > 1)
    slices = []
    for slot, count in enumerate(counts):
        start = draw.randrange(40)
        token_ids = (DRAWN,) if count == 1 and draw.random() < 0.5 else tuple(draw.randrange(99) for _ in range(count))
        blocks = tuple(draw.randrange(1, 99) for _ in range((start + count) // 4 + 1))
        sample = draw.random() < 0.6
        length = start + count + (not sample)
        slices.append(Slice(start, token_ids, blocks, sample, slot, True, length, scores=draw.random() < 0.3))
    return tuple(slices)


def test_the_columns_of_a_step_say_what_its_slices_say():
    draw = random.Random(0)
    for _ in range(200):
        slices = any_slices(draw)
        step = Step.of(slices)
        assert step.slices == slices
        assert step.num_slices == len(slices)
        assert step.positions.tolist() == [p for s in slices for p in range(s.start, s.start + len(s.token_ids))]
        firsts = [sum(len(part.token_ids) for part in slices[:row]) for row in range(len(slices))]
        pairs = list(zip(firsts, slices, strict=True))
        assert step.last_rows.tolist() == [first + len(part.token_ids) - 1 for first, part in pairs]
        assert step.scored_rows.tolist() == [first + n for first, part in pairs for n in range(part.num_scores)]
        assert step.decodes == (bool(slices) and all(s.sample and len(s.token_ids) == 1 for s in slices))
        assert StepCodec().decode(StepCodec().encode(step)).slices == slices


def test_steps_survive_their_way_to_the_other_ranks():
    steps = [
        Step.of(
            slices=(
                Slice(start=7, token_ids=(3,), blocks=(1, 2), sample=True),
                Slice(start=0, token_ids=(4, 5, 6), blocks=(9,), sample=False, slot=2, scores=True),
            ),
            clear=(5, 6),
        ),
        Step.of((Slice(8, (DRAWN,), (1, 2, 3), True, 0, fresh=False), Slice(3, (7,), (9,), True, 2, fresh=False))),
        Step.of((Slice(4, (DRAWN,), (9, 4), True, 2, fresh=False), Slice(0, (1, 2), (5,), True, 0))),
        Step.of(stop=True),
    ]
    leader, follower = StepCodec(), StepCodec()
    for step in steps:
        decoded = follower.decode(leader.encode(step))
        assert (decoded.slices, decoded.clear, decoded.stop) == (step.slices, step.clear, step.stop)
    assert [step.decodes for step in steps] == [False, True, False, False]


def test_a_step_that_goes_on_is_small():
    codec = StepCodec()
    table = tuple(range(1000))
    codec.encode(Step.of((Slice(start=999, token_ids=(3,), blocks=table, sample=True),)))
    assert len(codec.encode(Step.of((Slice(1000, (DRAWN,), (*table, 1000), True, fresh=False),)))) == 13
