"""How devices of one process give each other what each has, in LLVM's language: a function that XLA
calls for each device, in a thread of its own, at the place of the exchange in a program.

The layout of its argument is that of XLA's foreign functions (`xla/ffi/api/c_api.h`, which comes
with jaxlib). The devices meet in a control block, by words that name the run of the program and the
exchange in it, so that a run that was given up leaves nothing behind:

- Each says where its part lies, and records an event: from there on it may be read.
- Each copies the parts of all to its own result, after these events, and records another.
- Each goes on after these: then nobody reads its part any more.

One for which the driver refuses something says no more, so that all of them fail: who waits for it
gives up. So does then whoever waits, at this exchange or the next ones, which are called already:
nobody is waited for any more, until Python says so. Programs of so many devices have places of
their own in the block: some of the devices may be at an exchange of fewer while the others have yet
to see that the last one is done.

All of that is queued in the devices' own streams; the threads wait for one another only until it is
queued. Without streams (CPUs, in tests) the parts are copied at once.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from jlayer.cores.sharing import PAUSE

LINE = 128  # processors fetch cache lines in pairs
MOST_DEVICES = 64
# The control block: addresses of the driver's functions; then for each number of devices, and each
# device, what it tells the others, each on a line of its own, and what only it uses.
RECORD, WAIT, COPY, PUSH, POP, HAS_STREAMS, SLEEPS = range(0, 7 * 8, 8)
FIRST_DEVICE = LINE
POSTED, SOURCE = 0, 8
DONE = LINE
RUN, COUNT = 2 * LINE, 2 * LINE + 8
CONTEXT, READY_EVENT, DONE_EVENT = 3 * LINE, 3 * LINE + 8, 3 * LINE + 16
DEVICE_BYTES = 4 * LINE
GROUP_BYTES = MOST_DEVICES * DEVICE_BYTES
CONTROL_BYTES = FIRST_DEVICE + (MOST_DEVICES + 1) * GROUP_BYTES
# How often a thread asks whether the others have come before it sleeps for 20 us in between;
# `SLEEPS` says how often it sleeps before it gives up.
PATIENCE = 20_000
# The functions of XLA that are called.
CALLED = ("Error_Create", "Stream_Get", "RunId_Get", "DeviceOrdinal_Get")
_FIRST_FUNCTION = 48  # bytes into the table of them
_FIELD = re.compile(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);")
# What is read so many bytes into something: two instructions, as which one line of ours stands.
_FIELD_READ = re.compile(r"%(\w+) = field (\w+), ptr (%\w+), i64 (\S+)")
_READ = r"%\1_at = getelementptr i8, ptr \3, i64 \4\n  %\1 = load \2, ptr %\1_at, align 8"
_VERSION = re.compile(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)")


def offsets(header: Path) -> dict[str, int] | None:
    """Where XLA's table has the functions that are called, and the version ("MAJOR", "MINOR"), by
    its header; None where it has not all of them."""
    text = header.read_text() if header.is_file() else ""
    fields = enumerate(_FIELD.findall(text))
    found = {name: _FIRST_FUNCTION + 8 * number for number, name in fields}
    found |= {name: int(number) for name, number in _VERSION.findall(text)}
    wanted = (*CALLED, "MAJOR", "MINOR")
    if any(name not in found for name in wanted) or found["MAJOR"] != 0:
        return None
    return {name: found[name] for name in wanted}


def module(control: int, found: dict[str, int]) -> str:
    """The module with `all_gather`. `control`: the address of the control block; `found`: see
    `offsets`."""
    words = {name: value for name, value in globals().items() if isinstance(value, int)}
    words |= found | {"CONTROL": control, "PAUSE": PAUSE[platform.machine()]}
    return re.sub(r"\{(\w+)\}", lambda match: str(words[match[1]]), _FIELD_READ.sub(_READ, CODE))


def place_of(device: int, n_devices: int) -> int:
    """Where the control block has what is of a device among so many."""
    return FIRST_DEVICE + n_devices * GROUP_BYTES + device * DEVICE_BYTES


def _text(name: str, words: str) -> str:
    return f'@{name} = private constant [{len(words) + 1} x i8] c"{words}\\00"\n'


CODE = (
    _text("apart", "the devices did not meet at an exchange: one of them has failed")
    + _text("refused", "the driver refused to copy between devices")
    + """
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare i32 @usleep(i32)

; Whether a word has come to be so.
define i1 @await(ptr %at, i64 %wanted) nounwind {
entry:
  br label %ask
ask:
  %asked = phi i64 [0, %entry], [%more, %again], [%more, %sleep]
  %now = load atomic i64, ptr %at acquire, align 8
  %is = icmp eq i64 %now, %wanted
  br i1 %is, label %found, label %longer
longer:
  %more = add i64 %asked, 1
  %patient = icmp slt i64 %more, {PATIENCE}
  br i1 %patient, label %again, label %tired
again:
  {PAUSE}
  br label %ask
tired:
  %slept = sub i64 %more, {PATIENCE}
  %control = inttoptr i64 {CONTROL} to ptr
  %sleeps = field i64, ptr %control, i64 {SLEEPS}
  %hopeful = icmp slt i64 %slept, %sleeps
  br i1 %hopeful, label %sleep, label %lost
sleep:
  call i32 @usleep(i32 20)
  br label %ask
found:
  ret i1 true
lost:
  ret i1 false
}

; An error for XLA.
define ptr @failed(ptr %frame, ptr %message) nounwind {
  %error = alloca [32 x i8], align 8
  store i64 28, ptr %error, align 8
  %error_ext = getelementptr i8, ptr %error, i64 8
  store ptr null, ptr %error_ext, align 8
  %error_message = getelementptr i8, ptr %error, i64 16
  store ptr %message, ptr %error_message, align 8
  %error_code = getelementptr i8, ptr %error, i64 24
  store i32 13, ptr %error_code, align 8
  %api = field ptr, ptr %frame, i64 16
  %create = field ptr, ptr %api, i64 {Error_Create}
  %made = call ptr %create(ptr %error)
  ret ptr %made
}

; Asks XLA for something of this call: its number follows {size, extension, context}.
define ptr @asked(ptr %frame, ptr %question, i64 %size, i64 %which) nounwind {
  store i64 %size, ptr %question, align 8
  %ext = getelementptr i8, ptr %question, i64 8
  store ptr null, ptr %ext, align 8
  %context = field ptr, ptr %frame, i64 24
  %context_to = getelementptr i8, ptr %question, i64 16
  store ptr %context, ptr %context_to, align 8
  %answer = getelementptr i8, ptr %question, i64 24
  store i64 0, ptr %answer, align 8
  %api = field ptr, ptr %frame, i64 16
  %function = field ptr, ptr %api, i64 %which
  %error = call ptr %function(ptr %question)
  ret ptr %error
}

; The data of the first buffer of the arguments or results.
define ptr @data_of(ptr %frame, i64 %list) nounwind {
  %list_at = getelementptr i8, ptr %frame, i64 %list
  %buffers = load ptr, ptr %list_at, align 8
  %buffer = load ptr, ptr %buffers, align 8
  %data = field ptr, ptr %buffer, i64 24
  ret ptr %data
}

; A number among the attributes, which are sorted by name.
define i64 @number_of(ptr %frame, i64 %which) nounwind {
  %list = field ptr, ptr %frame, i64 160
  %one_at = getelementptr ptr, ptr %list, i64 %which
  %scalar = load ptr, ptr %one_at, align 8
  %value = field ptr, ptr %scalar, i64 8
  %number = load i64, ptr %value, align 8
  ret i64 %number
}

define ptr @all_gather(ptr %frame) nounwind {
entry:
  %question = alloca [32 x i8], align 8
  %old = alloca ptr, align 8
  %control = inttoptr i64 {CONTROL} to ptr
  %ext = field ptr, ptr %frame, i64 8
  %plain = icmp eq ptr %ext, null
  br i1 %plain, label %called, label %extended
extended:
  %kind = field i32, ptr %ext, i64 8
  %about = icmp eq i32 %kind, 1
  br i1 %about, label %describe, label %called
describe:                                 ; which version of the layout this is written for
  %description = field ptr, ptr %ext, i64 24
  %major = getelementptr i8, ptr %description, i64 24
  store i32 {MAJOR}, ptr %major, align 4
  %minor = getelementptr i8, ptr %description, i64 28
  store i32 {MINOR}, ptr %minor, align 4
  %traits = getelementptr i8, ptr %description, i64 32
  store i32 0, ptr %traits, align 4
  ret ptr null
called:
  %answer = getelementptr i8, ptr %question, i64 24
  %no_run = call ptr @asked(ptr %frame, ptr %question, i64 32, i64 {RunId_Get})
  %run = load i64, ptr %answer, align 8
  %has_run = icmp eq ptr %no_run, null
  br i1 %has_run, label %which, label %no_answer
which:
  %no_device = call ptr @asked(ptr %frame, ptr %question, i64 28, i64 {DeviceOrdinal_Get})
  %device32 = load i32, ptr %answer, align 8
  %device = sext i32 %device32 to i64
  %has_device = icmp eq ptr %no_device, null
  br i1 %has_device, label %known, label %no_answer
known:
  %n_bytes = call i64 @number_of(ptr %frame, i64 0)
  %n_devices = call i64 @number_of(ptr %frame, i64 1)
  %from = call ptr @data_of(ptr %frame, i64 72)
  %to = call ptr @data_of(ptr %frame, i64 112)
  %groups = getelementptr i8, ptr %control, i64 {FIRST_DEVICE}
  %devices = getelementptr [{GROUP_BYTES} x i8], ptr %groups, i64 %n_devices
  %own = getelementptr [{DEVICE_BYTES} x i8], ptr %devices, i64 %device
  %run_at = getelementptr i8, ptr %own, i64 {RUN}
  %count_at = getelementptr i8, ptr %own, i64 {COUNT}
  %last_run = load i64, ptr %run_at, align 8
  %last_count = load i64, ptr %count_at, align 8
  %same_run = icmp eq i64 %last_run, %run
  %next_count = add i64 %last_count, 1
  %count = select i1 %same_run, i64 %next_count, i64 1
  store i64 %run, ptr %run_at, align 8
  store i64 %count, ptr %count_at, align 8
  %run_high = shl i64 %run, 20
  %word = add i64 %run_high, %count
  %record = field ptr, ptr %control, i64 {RECORD}
  %wait = field ptr, ptr %control, i64 {WAIT}
  %copy = field ptr, ptr %control, i64 {COPY}
  %push = field ptr, ptr %control, i64 {PUSH}
  %pop = field ptr, ptr %control, i64 {POP}
  %context = field ptr, ptr %own, i64 {CONTEXT}
  %ready_event = field ptr, ptr %own, i64 {READY_EVENT}
  %done_event = field ptr, ptr %own, i64 {DONE_EVENT}
  %source_at = getelementptr i8, ptr %own, i64 {SOURCE}
  %posted_at = getelementptr i8, ptr %own, i64 {POSTED}
  %done_at = getelementptr i8, ptr %own, i64 {DONE}
  %streams = field i64, ptr %control, i64 {HAS_STREAMS}
  %has_streams = icmp ne i64 %streams, 0
  br i1 %has_streams, label %ask_stream, label %post
ask_stream:
  %no_stream = call ptr @asked(ptr %frame, ptr %question, i64 32, i64 {Stream_Get})
  %stream_given = load ptr, ptr %answer, align 8
  %has_stream = icmp eq ptr %no_stream, null
  br i1 %has_stream, label %post, label %no_answer
post:
  %stream = phi ptr [null, %known], [%stream_given, %ask_stream]
  %pushed = call i32 %push(ptr %context)
  %recorded = call i32 %record(ptr %ready_event, ptr %stream)
  %code1 = or i32 %pushed, %recorded
  %is_ready = icmp eq i32 %code1, 0
  br i1 %is_ready, label %say_ready, label %refusal
say_ready:
  store ptr %from, ptr %source_at, align 8
  store atomic i64 %word, ptr %posted_at release, align 8
  br label %gather
gather:                                   ; its own part first, so that not all read from one
  %step = phi i64 [0, %say_ready], [%step_next, %take]
  %code2 = phi i32 [0, %say_ready], [%code3, %take]
  %onward = add i64 %device, %step
  %other = urem i64 %onward, %n_devices
  %its = getelementptr [{DEVICE_BYTES} x i8], ptr %devices, i64 %other
  %its_posted = getelementptr i8, ptr %its, i64 {POSTED}
  %came = call i1 @await(ptr %its_posted, i64 %word)
  br i1 %came, label %take, label %lost
take:
  %its_source = getelementptr i8, ptr %its, i64 {SOURCE}
  %source = load ptr, ptr %its_source, align 8
  %its_context = field ptr, ptr %its, i64 {CONTEXT}
  %its_ready = field ptr, ptr %its, i64 {READY_EVENT}
  %place_offset = mul i64 %other, %n_bytes
  %place = getelementptr i8, ptr %to, i64 %place_offset
  %waited = call i32 %wait(ptr %stream, ptr %its_ready, i32 0)
  %copied = call i32 %copy(ptr %place, ptr %context, ptr %source, ptr %its_context,
    i64 %n_bytes, ptr %stream)
  %queued = or i32 %waited, %copied
  %code3 = or i32 %code2, %queued
  %step_next = add i64 %step, 1
  %more = icmp slt i64 %step_next, %n_devices
  br i1 %more, label %gather, label %gathered
gathered:
  %recorded_done = call i32 %record(ptr %done_event, ptr %stream)
  %code4 = or i32 %code3, %recorded_done
  %is_done = icmp eq i32 %code4, 0
  br i1 %is_done, label %say_done, label %refusal
say_done:
  store atomic i64 %word, ptr %done_at release, align 8
  br label %leave
leave:
  %turn = phi i64 [1, %say_done], [%turn_next, %release]
  %code5 = phi i32 [0, %say_done], [%code6, %release]
  %some_left = icmp slt i64 %turn, %n_devices
  br i1 %some_left, label %another, label %left
another:
  %onward2 = add i64 %device, %turn
  %other2 = urem i64 %onward2, %n_devices
  %its2 = getelementptr [{DEVICE_BYTES} x i8], ptr %devices, i64 %other2
  %its_done = getelementptr i8, ptr %its2, i64 {DONE}
  %came2 = call i1 @await(ptr %its_done, i64 %word)
  br i1 %came2, label %release, label %lost
release:
  %its_done_event = field ptr, ptr %its2, i64 {DONE_EVENT}
  %waited2 = call i32 %wait(ptr %stream, ptr %its_done_event, i32 0)
  %code6 = or i32 %code5, %waited2
  %turn_next = add i64 %turn, 1
  br label %leave
left:
  %well = icmp eq i32 %code5, 0
  br i1 %well, label %all_well, label %refusal
all_well:
  %popped = call i32 %pop(ptr %old)
  ret ptr null
no_answer:
  %why = phi ptr [%no_run, %called], [%no_device, %which], [%no_stream, %ask_stream]
  ret ptr %why
lost:
  %sleeps_at = getelementptr i8, ptr %control, i64 {SLEEPS}
  store atomic i64 0, ptr %sleeps_at release, align 8
  %popped2 = call i32 %pop(ptr %old)
  %error = call ptr @failed(ptr %frame, ptr @apart)
  ret ptr %error
refusal:
  %sleeps_at3 = getelementptr i8, ptr %control, i64 {SLEEPS}
  store atomic i64 0, ptr %sleeps_at3 release, align 8
  %popped3 = call i32 %pop(ptr %old)
  %error2 = call ptr @failed(ptr %frame, ptr @refused)
  ret ptr %error2
}

; What stands for the driver where there are no streams: all is done at once.
define i32 @nothing() nounwind {
  ret i32 0
}
define i32 @copy_now(ptr %to, ptr %c, ptr %from, ptr %d, i64 %n_bytes, ptr %s) nounwind {
  call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %n_bytes, i1 false)
  ret i32 0
}
"""
)
