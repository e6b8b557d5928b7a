"""What the modes measure with: time, peak memory, and a profile taken apart."""

import contextlib
import ctypes
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from runtime import hardware

# ---- memory ----


def reset_peak_memory(device):
    """Start anew what peak_memory(device) reports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return

    with contextlib.suppress(OSError, AttributeError):
        # Freed memory stays resident unless it is given back, and using it again would not count.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def peak_memory(device):
    """The most bytes since reset_peak_memory: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    # Not getrusage, whose maximum includes the process that started this one.
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no line VmHWM: peak memory is measured on Linux only")


def peak_of(function, device):
    """The most bytes that tensors take at once during function(), beyond those from before.

    Exact: as the allocators report it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before

    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        function()

    live = {}  # pointer -> bytes
    peak = 0
    for _, pointer, size in sorted(allocations(profile)):
        if size > 0:
            live[pointer] = size
            peak = max(peak, sum(live.values()))
        else:
            # Memory from before the call may be freed too; that does not lower the peak.
            live.pop(pointer, None)
    return peak


def allocations(profile):
    """Each allocation that a profile with memory has seen: (time in ns, pointer, bytes).

    Bytes are negative where memory was freed.
    """
    events = profile.profiler.kineto_results.experimental_event_tree()
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size


# ---- time ----


def seconds_of(function, device):
    """The duration of a call, after a first one that is not timed.

    On a CPU: the mean over half a second or 20 calls. On a GPU: how long the GPU is busy with one
    call, because in a training step the host queues it while the towers are still at work.
    """
    function()
    hardware.synchronize(device)

    if device.type == "cuda":
        with profiled(device) as profile:
            function()
            hardware.synchronize(device)
        return parts_of(profile.events(), 0.0, on_gpu=True)["compute"]

    start = time.perf_counter()
    calls = 0
    while calls < 1 or (calls < 20 and time.perf_counter() - start < 0.5):
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


# ---- a profile, taken apart ----


def profiled(device):
    """A torch.profiler.profile of this process and, if the device is one, of the GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def parts_of(events, seconds, on_gpu):
    """The events of one profiled step, which took `seconds` -> {part of the step: seconds}.

    compute, optimizer  an operator (on a GPU: a kernel) runs that is not a collective
    exposed             a collective is under way and nothing is computed
    data                the step waits for the data loader, beside neither of the above
    other               the rest; these five add up to `seconds`
    hidden              a collective is under way behind computation (part of compute, optimizer)

    A collective lasts from its start to its end, so it includes the wait for the slowest rank.
    """
    collectives = [event for event in events if is_collective(event, on_gpu)]
    # gloo computes its sums in threads of its own: what runs there belongs to the collective.
    gloo_threads = {event.thread for event in collectives}
    computations = [event for event in events if is_computation(event, on_gpu, gloo_threads)]
    device_type = DeviceType.CUDA if on_gpu else DeviceType.CPU
    updates = [
        event
        for event in events
        if event.device_type == device_type and event.name.startswith("Optimizer.step")
    ]
    waits = [event for event in events if event.name.startswith("enumerate(DataLoader)")]

    communication = spans_of(collectives)
    busy = spans_of(computations)
    busy_outside_updates = without(busy, spans_of(updates))
    exposed = without(communication, busy)
    data = without(without(spans_of(waits), busy), communication)

    parts = {
        "compute": length(busy_outside_updates),
        "optimizer": length(busy) - length(busy_outside_updates),
        "exposed": length(exposed),
        "data": length(data),
    }
    parts["other"] = seconds - sum(parts.values())
    parts["hidden"] = length(communication) - parts["exposed"]
    return parts


def is_kernel(event):
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def is_collective(event, on_gpu):
    if on_gpu:
        return is_kernel(event) and "nccl" in event.name.lower()
    return event.name.startswith("gloo:")


def is_computation(event, on_gpu, gloo_threads):
    if is_collective(event, on_gpu):
        return False
    if on_gpu:
        return is_kernel(event)
    return event.name.startswith("aten::") and event.thread not in gloo_threads


def spans_of(events):
    """When at least one of the events is under way: a union of spans, in seconds."""
    spans = []
    for event in events:
        microseconds = event.time_range
        spans.append((microseconds.start / 1e6, microseconds.end / 1e6))
    return union(spans)


def union(spans):
    """Spans [(start, end)] in any order -> sorted and disjoint spans that cover the same time."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            last_start, last_end = merged.pop()
            merged.append((last_start, max(end, last_end)))
        else:
            merged.append((start, end))
    return merged


def without(spans, holes):
    """The parts of `spans` that lie in none of the `holes`. Arguments and result are unions."""
    for hole_start, hole_end in holes:
        rest = []
        for start, end in spans:
            before = (start, min(end, hole_start))
            after = (max(start, hole_end), end)
            rest += [part for part in (before, after) if part[0] < part[1]]
        spans = rest
    return spans


def length(spans):
    return sum(end - start for start, end in spans)
