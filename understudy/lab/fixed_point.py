"""The fixed point of the idle-memory tax between two machines, solved by itself.

Idea: rho = S / (P (f + k (1 - f))) is the same for both.  What a machine's pages cost,
P (f + k (1 - f)), is the larger of two lines, P and k P - (k - 1) A, where A are its active pages:
so the fixed point is where two of four lines meet, and one formula solves it.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server", "Reclaiming Idle Memory".
Invariant: nothing of `overcommit.plan` computes here: experiments compare it with this.
"""

from fractions import Fraction

from understudy.overcommit.plan import Need


def fixed_point(one: Need, other: Need, pages: int, tau: str) -> Fraction:
    """What `one` gets of so many pages: both pay the same price, or a bound is reached."""
    k = 1 / (1 - Fraction(tau))

    def lines(need: Need) -> list[tuple[Fraction, Fraction]]:
        """(m, c): as if all were active, and as if some were idle, P pages cost m P - c."""
        return [(Fraction(1), Fraction(0)), (k, (k - 1) * need.active)]

    def meet(mine: tuple[Fraction, Fraction], its: tuple[Fraction, Fraction]) -> Fraction:
        """P, where other.shares (m P - c) = one.shares (m' (pages - P) - c')."""
        slope = other.shares * mine[0] + one.shares * its[0]
        return (one.shares * (its[0] * pages - its[1]) + other.shares * mine[1]) / slope

    # What costs more decides: of its own lines the one that is met earlier, of the other's later.
    free = min(max(meet(mine, its) for its in lines(other)) for mine in lines(one))
    low, high = max(one.minimum, pages - other.maximum), min(one.maximum, pages - other.minimum)
    return min(max(free, Fraction(low)), Fraction(high))
