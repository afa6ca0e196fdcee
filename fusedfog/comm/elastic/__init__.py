"""Membership that may change: a run whose processes may die, and come back, while the others train on.

A **member** is `slot.incarnation`: its place in the run, and how often it was restarted. An **epoch** is a period of one
membership. Each has a process group of its own, the default one of torch.distributed meanwhile, over a part of the store of
its own, so that no message of an earlier epoch can arrive in it. The **record** of the newest epoch lies in the store and
is changed by compare-and-set alone.

    an exchange fails         the step is finished with W = I, and the epoch is over for this member
    next begin of a step      it writes a **note** that it is ready for epoch N + 1, and waits for the others
    all ready, or dead        the lowest of those that are ready proposes the record; all who are in it open the epoch
    somebody joins            it fetches parameters and states from a member, then writes a note as members do

Whoever waits in an epoch is told that it is over by a thread (`watching`), which looks whether notes for the next one exist: a
member leaves an epoch for a reason only, a note or a dead member, never for a mere failure of somebody else's to be heard of.

Dead is who refuses connections, whose place another incarnation has taken, or for whom the launcher has written a certificate.
Who only does not answer, and whose launcher's counter stands still, counts as **lost** after `dead_after` seconds by the clock of
whoever asks. More than half of those that are not dead go on (of an even split, the half with the lowest member); the rest raise
`Minority`. So of two sides of a broken network one goes on, and of a run of which all but one have died, that one.

A process that has been let go and wakes takes a further number, `slot.incarnation.returns`, so that no launcher's next process
has the same, and joins as a newcomer does. It does so at the beginning of a step only: a call that others have made without it,
it could make with nobody.

A member that was behind (by a step or two) comes out of a re-form with the clock of the one that was ahead, having used its
gradient in a step that mixed nothing: no gradient is lost or applied twice. A newcomer is admitted only where all members are
about to begin the same step, so that its program and theirs make the same calls from then on.

Asynchronous members keep the clocks that they have, and a newcomer takes that of the member whose state it got: what that one
calls from then on together with others, it calls too. In their steps nobody waits for anybody, so that none would miss another:
the thread of each member asks the one of the next rank now and then.

    identity    who this process is, by its environment          record      records and notes, and what follows from them
    board       the store, with deadlines and fallbacks          asking      who answers at the members' ports
    epoch       the process groups of an epoch                   forming     the loop that makes the next one
    watching    the thread that looks for notes                  silence     since when members have not answered
    run         all of it together: what optimizers use

Nothing here runs in a process that has not called `fusedfog.init(elastic=True)`.
"""
