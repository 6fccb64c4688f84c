"""What the guard of post-training calls too much: every threshold, with its unit and where it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Every threshold. "toy": measured on the office task with a 0.4M model; calibrate on healthy runs of your task."""

    hold_share: float = 0.05
    """share of the budget that a signal must stay beyond its limit, within the next two"""
    hold_rows: int = 3
    """logged rows in a row, at least: one row is an outlier (the k3 estimate of KL has heavy tails)"""
    hold_rows_most: int = 8
    """logged rows in a row, at most"""
    baseline_share: float = 0.03
    """share of the budget whose rows, one to eight of them, tell where a signal started"""
    zero_loss: float = 0.05
    """median size of the last losses from which on an exact 0.0 is TRL's disguise of NaN (logging_nan_inf_filter)"""
    loss_floor: float = 0.3
    """nats above the lowest level that a loss is forgiven, as in pretraining"""
    loss_share: float = 0.3
    """share of what was learned that it is forgiven on top"""
    loss_sds: float = 4.0
    """standard deviations of a row that it is forgiven on top"""
    loss_hold_share: float = 0.05
    """share of the budget that it must stay there, 3 to 30 rows; four times as long while it falls"""
    kl_warn: float = 0.3
    """nats per token against the reference that are odd; toy: healthy runs stay under 0.05"""
    kl_max: float = 1.0
    """nats per token that end a run; toy: a length reward reached 1.5 within 8 steps"""
    logp_fall: float = 3.0
    """nats per sequence that the chosen answers may lose; toy: collapse lost 17.7"""
    logp_fall_share: float = 0.5
    """share of their first log-probability that they may lose, where more: long answers lose some in good runs"""
    logp_fall_alone: float = 10.0
    """nats per sequence whose loss ends a run that has no held-out task"""
    logp_fall_alone_share: float = 1.0
    """the same as a share of the first log-probability, where that is more"""
    reward_sds: float = 2.0
    """standard deviations of a row by which a reward has risen"""
    clipped_warn: float = 0.3
    """share of completions at the limit that is odd, if it has risen by two thirds of that"""
    clipped_max: float = 0.5
    """share of completions at the limit that ends a run, if it has risen by `clipped_rise`; toy: 0.83 when hacked"""
    clipped_rise: float = 0.3
    """rise of that share over its start: a base model that never stops starts at 0.9"""
    length_factor: float = 1.5
    """growth of the completions that names a fall in quality; toy: 40 to 91 tokens when hacked"""
    length_factor_odd: float = 3.0
    """growth that is odd where nobody counts clipped completions; a weak start grows by as much when it learns"""
    entropy_low: float = 0.2
    """share of its start below which entropy is lost; toy: healthy GRPO keeps 0.63"""
    entropy_hold_share: float = 0.1
    """share of the budget that it must stay lost, without a gain: it ruins nothing at once"""
    entropy_high: float = 1.5
    """growth of DPO's and KTO's entropy that is odd; toy: collapse grew 1.9 times"""
    zero_std_warn: float = 0.9
    """share of prompts whose completions all earn the same from which on there is hardly a gradient"""
    zero_std_lost: float = 0.97
    """mean of that share since the first row that ends a run"""
    no_signal_share: float = 0.2
    """share of the budget after which that mean is looked at, once"""
    no_signal_rows: int = 8
    """rows of that mean, at least: eight prompts a row are few"""
    eval_n: int = 64
    """held-out items, where `eval/n` does not say"""
    wander: float = 0.04
    """standard deviation by which a healthy model's score moves between evaluations, beside the error of its items"""
    fall_min: float = 0.1
    """fall of the held-out score below its start that matters at all"""
    fall_z: float = 4.0
    """standard errors of a fall over two evaluations in a row or more"""
    fall_hold: float = 0.05
    """share of all evaluations so far that such a fall must last: of many, some are low together"""
    fall_z_once: float = 5.0
    """standard errors of a fall to less than half, in a single evaluation"""
    fall_z_odd: float = 3.0
    """standard errors, in a single evaluation, of a fall while a training signal is odd"""
    fall_best: float = 0.2
    """fall below the best two evaluations in a row that matters, or a third of them if that is more"""
    fall_best_z: float = 0.5
    """standard errors that such a fall needs on top: the best of many is lucky"""
    gain_z: float = 2.0
    """standard errors of a gain that excuses long answers and low entropy"""
    solved: float = 0.85
    """held-out score, over two evaluations, from which on low entropy is no loss"""
