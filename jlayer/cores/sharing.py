"""How threads share a product, in LLVM's language.

All on the words of one control block:

- The caller writes a list of jobs, then a new generation into OPEN. A thread that sees one which it
  has not worked on adds itself to INSIDE, and only then reads OPEN again: if that is closed
  meanwhile it leaves without having looked at the list.
- Whoever is inside takes the next block of rows until none is left. Then the caller closes OPEN and
  waits until INSIDE is zero. So a product is complete without the threads that slept through it,
  and none reads the list of a finished one.
- A thread without work watches OPEN for `SPIN_S`, then sleeps (futex) until it changes. One that
  was woken wakes two more.
"""

from __future__ import annotations

import platform
import re

from jlayer.cores.jobs import FIELDS, JOB_BYTES, STEP_BYTES, offset
from jlayer.cores.native import FUTEX

# How long a thread without work watches for some before it sleeps: longer than the pause between
# two products of a layer, too short to matter to others.
SPIN_S = 100e-6  # unless its owner says otherwise
# How often the caller asks whether the others are done before it gives its core away in between.
PATIENCE = 2000
# The words of the control block. Processors fetch cache lines in pairs: each has its own pair.
LINE = 128
OPEN, INSIDE, NEXT, SLEEPING, LIST, STOPPING = (LINE * number for number in range(6))
N_BLOCKS, JOBS, SPIN = LIST, LIST + 8, LIST + 16
CONTROL_BYTES = 6 * LINE
CLOSED = 0

PAUSE = {
    "x86_64": "call void @llvm.x86.sse2.pause()",
    "aarch64": "call void @llvm.aarch64.hint(i32 1)",
}


def module() -> str:
    """The module with `serve` (a thread's life), `open` and `finish` (a caller's), and `wake`."""
    words = {field: offset(field) for field in FIELDS} | {
        "INSIDE": INSIDE,
        "NEXT": NEXT,
        "SLEEPING": SLEEPING,
        "STOPPING": STOPPING,
        "N_BLOCKS": N_BLOCKS,
        "JOBS": JOBS,
        "CLOSED": CLOSED,
        "JOB_BYTES": JOB_BYTES,
        "STEP_BYTES": STEP_BYTES,
        "SPIN": SPIN,
        "PATIENCE": PATIENCE,
        "FUTEX": FUTEX[platform.machine()],
        "PAUSE": PAUSE[platform.machine()],
    }
    return re.sub(r"\{(\w+)\}", lambda found: str(words[found[1]]), CODE)


CODE = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
declare i32 @clock_gettime(i32, ptr)

; Takes blocks of rows until none is left.
define void @take(ptr %control) nounwind {
entry:
  %next = getelementptr i8, ptr %control, i64 {NEXT}
  %n_at = getelementptr i8, ptr %control, i64 {N_BLOCKS}
  %jobs_at = getelementptr i8, ptr %control, i64 {JOBS}
  %n = load i64, ptr %n_at, align 8
  %jobs = load ptr, ptr %jobs_at, align 8
  br label %another
another:
  %job0 = phi ptr [%jobs, %entry], [%job, %again]
  %block = atomicrmw add ptr %next, i64 1 seq_cst
  %left = icmp slt i64 %block, %n
  br i1 %left, label %seek, label %none
seek:                                     ; later blocks belong to this job or to later ones
  %job = phi ptr [%job0, %another], [%later, %onward]
  %end_at = getelementptr i8, ptr %job, i64 {end_block}
  %end_block = load i64, ptr %end_at, align 8
  %here = icmp slt i64 %block, %end_block
  br i1 %here, label %found, label %onward
onward:
  %later = getelementptr i8, ptr %job, i64 {JOB_BYTES}
  br label %seek
found:
  %first_block_at = getelementptr i8, ptr %job, i64 {first_block}
  %first_block = load i64, ptr %first_block_at, align 8
  %rows_at = getelementptr i8, ptr %job, i64 {rows}
  %rows = load i64, ptr %rows_at, align 8
  %block_rows_at = getelementptr i8, ptr %job, i64 {block_rows}
  %block_rows = load i64, ptr %block_rows_at, align 8
  %chunk_rows_at = getelementptr i8, ptr %job, i64 {chunk_rows}
  %chunk_rows = load i64, ptr %chunk_rows_at, align 8
  %n_steps_at = getelementptr i8, ptr %job, i64 {n_steps}
  %n_steps = load i64, ptr %n_steps_at, align 8
  %steps_at = getelementptr i8, ptr %job, i64 {steps}
  %steps = load ptr, ptr %steps_at, align 8
  %steps_end = getelementptr [{STEP_BYTES} x i8], ptr %steps, i64 %n_steps
  %length_at = getelementptr i8, ptr %job, i64 {length}
  %length = load i64, ptr %length_at, align 8
  %part_at = getelementptr i8, ptr %job, i64 {part}
  %part = load i64, ptr %part_at, align 8
  %number = sub i64 %block, %first_block
  %first = mul i64 %number, %block_rows
  %full = add i64 %first, %block_rows
  %end = call i64 @llvm.smin.i64(i64 %full, i64 %rows)
  br label %chunk
chunk:                                    ; all inputs of these rows before the next rows
  %row = phi i64 [%first, %found], [%row_end, %chunk_done]
  %row_full = add i64 %row, %chunk_rows
  %row_end = call i64 @llvm.smin.i64(i64 %row_full, i64 %end)
  br label %inputs
inputs:                                   ; all columns of these inputs before the next inputs
  %input = phi i64 [0, %chunk], [%input_next, %inputs_done]
  br label %step
step:
  %step_now = phi ptr [%steps, %inputs], [%step_next, %step]
  %kernel = load ptr, ptr %step_now, align 8
  %column_at = getelementptr i8, ptr %step_now, i64 8
  %column = load i64, ptr %column_at, align 8
  call void %kernel(ptr %job, i64 %row, i64 %row_end, i64 %column, i64 %input)
  %step_next = getelementptr i8, ptr %step_now, i64 {STEP_BYTES}
  %more_steps = icmp ult ptr %step_next, %steps_end
  br i1 %more_steps, label %step, label %inputs_done
inputs_done:
  %input_next = add i64 %input, %part
  %more_inputs = icmp slt i64 %input_next, %length
  br i1 %more_inputs, label %inputs, label %chunk_done
chunk_done:
  %more_rows = icmp slt i64 %row_end, %end
  br i1 %more_rows, label %chunk, label %again
again:
  br label %another
none:
  ret void
}
declare i64 @llvm.smin.i64(i64, i64)

define i64 @now_ns() nounwind {
  %time = alloca { i64, i64 }, align 8
  call i32 @clock_gettime(i32 1, ptr %time)
  %s = load i64, ptr %time, align 8
  %rest_at = getelementptr i8, ptr %time, i64 8
  %rest = load i64, ptr %rest_at, align 8
  %s_ns = mul i64 %s, 1000000000
  %ns = add i64 %s_ns, %rest
  ret i64 %ns
}

define void @wake(ptr %control, i32 %n) nounwind {
entry:
  %at = getelementptr i8, ptr %control, i64 {SLEEPING}
  %sleeping = load atomic i64, ptr %at seq_cst, align 8
  %some = icmp sgt i64 %sleeping, 0
  %wanted = icmp sgt i32 %n, 0
  %any = and i1 %some, %wanted
  br i1 %any, label %call, label %done
call:                                     ; 129: FUTEX_WAKE, private
  call i64 (i64, ...) @syscall(i64 {FUTEX}, ptr %control, i32 129, i32 %n)
  br label %done
done:
  ret void
}

; A thread's life, until it is told to stop. OPEN is the control block's first word.
define void @serve(ptr %control) nounwind {
entry:
  %inside = getelementptr i8, ptr %control, i64 {INSIDE}
  %sleeping = getelementptr i8, ptr %control, i64 {SLEEPING}
  %stopping = getelementptr i8, ptr %control, i64 {STOPPING}
  %spin_at = getelementptr i8, ptr %control, i64 {SPIN}
  %spin_ns = load i64, ptr %spin_at, align 8
  br label %idle
idle:
  %last = phi i64 [{CLOSED}, %entry], [%last_awake, %awake], [%seen, %leave]
  %began = call i64 @now_ns()
  br label %watch
watch:
  %count = phi i64 [0, %idle], [%count_next, %watching]
  %stop = load atomic i64, ptr %stopping seq_cst, align 8
  %stops = icmp ne i64 %stop, 0
  br i1 %stops, label %end, label %look
look:
  %open = load atomic i64, ptr %control seq_cst, align 8
  %is_closed = icmp eq i64 %open, {CLOSED}
  %is_old = icmp eq i64 %open, %last
  %nothing = or i1 %is_closed, %is_old
  br i1 %nothing, label %wait, label %enter
wait:
  {PAUSE}
  %count_next = add i64 %count, 1
  %often = and i64 %count_next, 31
  %look_at_clock = icmp eq i64 %often, 0
  br i1 %look_at_clock, label %clock, label %watching
watching:
  br label %watch
clock:
  %now = call i64 @now_ns()
  %waited = sub i64 %now, %began
  %long = icmp sgt i64 %waited, %spin_ns
  br i1 %long, label %sleep, label %watching_after_clock
watching_after_clock:
  br label %watching
sleep:                                    ; 128: FUTEX_WAIT, private; returns at once if it is open
  atomicrmw add ptr %sleeping, i64 1 seq_cst
  call i64 (i64, ...) @syscall(i64 {FUTEX}, ptr %control, i32 128, i32 {CLOSED}, ptr null)
  atomicrmw sub ptr %sleeping, i64 1 seq_cst
  br label %awake
awake:
  %last_awake = phi i64 [%last, %sleep]
  call void @wake(ptr %control, i32 2)
  br label %idle
enter:
  atomicrmw add ptr %inside, i64 1 seq_cst
  %seen = load atomic i64, ptr %control seq_cst, align 8
  %still = icmp ne i64 %seen, {CLOSED}
  br i1 %still, label %work, label %leave
work:
  call void @take(ptr %control)
  br label %leave
leave:
  atomicrmw sub ptr %inside, i64 1 seq_cst
  br label %idle
end:
  ret void
}

; The caller's part begins: opens a generation, and wakes who sleeps.
define void @open(ptr %control, i64 %generation, i32 %n_woken) nounwind {
entry:
  %next = getelementptr i8, ptr %control, i64 {NEXT}
  store atomic i64 0, ptr %next seq_cst, align 8
  store atomic i64 %generation, ptr %control seq_cst, align 8
  call void @wake(ptr %control, i32 %n_woken)
  ret void
}

; The caller's part ends: takes blocks too, closes the generation, waits for the last thread.
define void @finish(ptr %control) nounwind {
entry:
  %inside = getelementptr i8, ptr %control, i64 {INSIDE}
  call void @take(ptr %control)
  store atomic i64 {CLOSED}, ptr %control seq_cst, align 8
  br label %check
check:
  %count = phi i64 [0, %entry], [%count_next, %wait], [%count_next, %yield]
  %count_next = add i64 %count, 1
  %others = load atomic i64, ptr %inside seq_cst, align 8
  %alone = icmp eq i64 %others, 0
  br i1 %alone, label %end, label %still
still:
  %is_long = icmp sgt i64 %count, {PATIENCE}
  br i1 %is_long, label %yield, label %wait
wait:
  {PAUSE}
  br label %check
yield:                                    ; the last one may be waiting for this very core
  call i32 @sched_yield()
  br label %check
end:
  ret void
}
"""
