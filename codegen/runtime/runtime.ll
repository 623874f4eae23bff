; Runtime of a compiled module. Plain libc and pthreads; the program's own part is lt_bind, lt_place and lt_main.
; @SYS_FUTEX@ and @PAUSE@ are replaced for the target. The program's part sees the types and the functions named lt.*, which do
; not leave the library.
;
; One call is SPMD: lt_run wakes the workers once and every thread runs lt_main. Iterations of a parallel loop are handed out
; in chunks through one 64-bit word, {number of the loop in this run: 32, next chunk: 32}: a thread moves on to loop e + 1 only
; when loop e has no chunk left, so late threads see a larger number and know that their loop is done. Where data crosses
; threads all wait until the work before that place is complete, counted in chunks (what only thread 0 does is one chunk), not
; until all threads have arrived: a thread that the system does not run holds nobody up as long as it holds no chunk. Only values
; that steer lt_main itself (extents and conditions read from memory) need barriers.
; A worker joins a run through the gate {run: 32, open: 1, threads inside: 31}; one that wakes too late finds it closed.

%tensor = type { ptr, i64, i32, i32, [8 x i64] }          ; data, capacity in bytes, dtype, rank, shape
%state = type { ptr, i64, i64, i64, i32 }                 ; of a thread: context, number, loops so far, threads, chunks so far
%worker = type { ptr, i64, i64 }                          ; context, number, pthread handle
%ctx = type {
  i64, [56 x i8],        ; 0  loop and chunk
  i32, i32, [56 x i8],   ; 2  chunks complete (futex), sleepers
  i32, [60 x i8],        ; 5  threads that arrived at the barrier
  i32, i32, [56 x i8],   ; 7  barriers passed (futex), sleepers
  i64, i32, i32, [48 x i8], ; 10 gate (two futexes), sleeping workers, sleeping caller
  ptr, ptr, i64,         ; 14 weights, arena, bytes of the arena
  ptr, ptr, ptr, ptr,    ; 17 inputs, outputs, profile, workers
  i64,                   ; 21 time of the last mark, ns
  i32, i32, i32, i32,    ; 22 threads wanted, workers running, process of the workers, stop
  i32, i32,              ; 26 status, threads in this run
  i64, i64, [88 x i8],   ; 28 spin, ns; threads that the work of this run is worth
  [512 x i8],            ; 31 message
  [0 x i64]              ; 32 words of the program, at byte 1024
}

; The program's part.
@lt.weights_bytes = external hidden constant i64
@lt.ctx_bytes = external hidden constant i64
@lt.parallel = external hidden constant i32
@lt.dyn_first = external hidden constant i64
@lt.dyn_count = external hidden constant i64
declare hidden i32 @lt_bind(ptr, ptr, i32, ptr, i32)
declare hidden i32 @lt_place(ptr, ptr, ptr)
declare hidden void @lt_main(ptr)

declare i32 @posix_memalign(ptr, i64, i64)
declare ptr @calloc(i64, i64)
declare void @free(ptr)
declare i32 @snprintf(ptr, i64, ptr, ...)
declare i64 @strlen(ptr)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join(i64, ptr)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @clock_gettime(i32, ptr)
declare i32 @getpid()
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i64 @llvm.ctpop.i64(i64)
declare i64 @llvm.smax.i64(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)

@lt.e.count = private constant [50 x i8] c"%s: expected %d tensors, got %d (wrong ABI call?)\00"
@lt.e.dtype = private constant [37 x i8] c"input %s: dtype code %d, expected %d\00"
@lt.e.rank = private constant [31 x i8] c"input %s: rank %d, expected %d\00"
@lt.e.dimk = private constant [46 x i8] c"input %s: dimension %d is %lld, expected %lld\00"
@lt.e.range = private constant [57 x i8] c"input %s: dimension %d is %lld, allowed are %lld to %lld\00"
@lt.e.extent = private constant [59 x i8] c"%s: dimension %d would be %lld; the inputs do not allow it\00"
@lt.e.equal = private constant [33 x i8] c"%s do not fit: %lld against %lld\00"
@lt.e.value = private constant [61 x i8] c"%s is %lld in the data of this run, allowed are %lld to %lld\00"
@lt.e.null = private constant [18 x i8] c"input %s: no data\00"
@lt.e.out = private constant [54 x i8] c"output %s: needs %lld bytes, the array given has %lld\00"
@lt.e.index = private constant [62 x i8] c"kernel %s: index %lld of buffer %s is outside its extent %lld\00"
@lt.e.at = private constant [5 x i8] c"; %s\00"
@lt.e.mem = private constant [33 x i8] c"out of memory: %lld bytes for %s\00"
@lt.s.arena = private constant [12 x i8] c"temporaries\00"
@lt.s.in = private constant [7 x i8] c"inputs\00"
@lt.s.out = private constant [8 x i8] c"outputs\00"

; ------------------------------------------------------------------ errors

define hidden void @lt.status(ptr %ctx, i32 %code) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 26
  store i32 %code, ptr %p
  ret void
}

define hidden ptr @lt.msg(ptr %ctx) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 31
  ret ptr %p
}

define hidden i1 @lt.failed(ptr %ctx) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 26
  %v = load i32, ptr %p
  %r = icmp ne i32 %v, 0
  ret i1 %r
}

define hidden void @lt.no_memory(ptr %ctx, i64 %bytes, ptr %what) {
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.mem, i64 %bytes, ptr %what)
  call void @lt.status(ptr %ctx, i32 3)
  ret void
}

; Counts of inputs and outputs: 1 is a caller's mistake.
define hidden void @lt.check_count(ptr %ctx, i32 %n, i32 %want, i32 %outputs) {
  %bad = icmp ne i32 %n, %want
  br i1 %bad, label %fail, label %ok
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  %o = icmp ne i32 %outputs, 0
  %s = select i1 %o, ptr @lt.s.out, ptr @lt.s.in
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.count, ptr %s, i32 %want, i32 %n)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

define hidden void @lt.check_tensor(ptr %ctx, ptr %t, ptr %name, i32 %dtype, i32 %rank) {
  %done = call i1 @lt.failed(ptr %ctx)
  br i1 %done, label %ok, label %types
types:
  %m = call ptr @lt.msg(ptr %ctx)
  %dp = getelementptr %tensor, ptr %t, i32 0, i32 2
  %d = load i32, ptr %dp
  %db = icmp ne i32 %d, %dtype
  br i1 %db, label %bad_dtype, label %ranks
bad_dtype:
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.dtype, ptr %name, i32 %d, i32 %dtype)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ranks:
  %rp = getelementptr %tensor, ptr %t, i32 0, i32 3
  %r = load i32, ptr %rp
  %rb = icmp ne i32 %r, %rank
  br i1 %rb, label %bad_rank, label %ok
bad_rank:
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.rank, ptr %name, i32 %r, i32 %rank)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

define hidden void @lt.check_dim(ptr %ctx, ptr %name, i32 %axis, i64 %got, i64 %want) {
  %bad = icmp ne i64 %got, %want
  br i1 %bad, label %first, label %ok
first:
  %done = call i1 @lt.failed(ptr %ctx)
  br i1 %done, label %ok, label %fail
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.dimk, ptr %name, i32 %axis, i64 %got, i64 %want)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

define hidden void @lt.check_range(ptr %ctx, ptr %name, i32 %axis, i64 %got, i64 %lo, i64 %hi) {
  %a = icmp slt i64 %got, %lo
  %b = icmp sgt i64 %got, %hi
  %bad = or i1 %a, %b
  br i1 %bad, label %first, label %ok
first:
  %done = call i1 @lt.failed(ptr %ctx)
  br i1 %done, label %ok, label %fail
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.range, ptr %name, i32 %axis, i64 %got, i64 %lo, i64 %hi)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

; An index out of bounds, found by a kernel on any thread: the first one is told.
define hidden void @lt.fault(ptr %ctx, ptr %kernel, ptr %buffer, i64 %index, i64 %extent) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 26
  %x = cmpxchg ptr %p, i32 0, i32 4 seq_cst seq_cst
  %first = extractvalue { i32, i1 } %x, 1
  br i1 %first, label %tell, label %out
tell:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.index, ptr %kernel, i64 %index, ptr %buffer, i64 %extent)
  ret void
out:
  ret void
}

; Where it happened, added to the message.
define hidden void @lt.at(ptr %ctx, ptr %what) {
  %m = call ptr @lt.msg(ptr %ctx)
  %n = call i64 @strlen(ptr %m)
  %end = getelementptr i8, ptr %m, i64 %n
  %left = sub i64 512, %n
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %end, i64 %left, ptr @lt.e.at, ptr %what)
  ret void
}

; An extent that follows from the inputs must not be negative.
define hidden void @lt.check_extent(ptr %ctx, ptr %name, i32 %axis, i64 %got) {
  %bad = icmp slt i64 %got, 0
  br i1 %bad, label %first, label %ok
first:
  %done = call i1 @lt.failed(ptr %ctx)
  br i1 %done, label %ok, label %fail
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.extent, ptr %name, i32 %axis, i64 %got)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

; Extents that an operator needs to be equal.
define hidden void @lt.check_equal(ptr %ctx, ptr %what, i64 %got, i64 %want) {
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.equal, ptr %what, i64 %got, i64 %want)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
}

; A value that was read from memory and is used as an extent or a position.
define hidden void @lt.check_value(ptr %ctx, ptr %name, i64 %got, i64 %lo, i64 %hi) {
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.value, ptr %name, i64 %got, i64 %lo, i64 %hi)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
}

; ------------------------------------------------------------------ memory

define hidden ptr @lt.alloc(i64 %bytes) {
  %p = alloca ptr
  %n = call i64 @llvm.smax.i64(i64 %bytes, i64 64)
  %rc = call i32 @posix_memalign(ptr %p, i64 64, i64 %n)
  %bad = icmp ne i32 %rc, 0
  %v = load ptr, ptr %p
  %r = select i1 %bad, ptr null, ptr %v
  ret ptr %r
}

; The data of an input into the program's table; only an empty tensor may have none.
define hidden void @lt.input(ptr %ctx, ptr %t, ptr %name, ptr %word, i64 %bytes) {
  %p = load ptr, ptr %t
  store ptr %p, ptr %word
  %z = icmp eq ptr %p, null
  %some = icmp sgt i64 %bytes, 0
  %bad = and i1 %z, %some
  br i1 %bad, label %fail, label %ok
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.null, ptr %name)
  call void @lt.status(ptr %ctx, i32 1)
  ret void
ok:
  ret void
}

; An input that may be left out (beyond the count, or all zeros): the caller's tensor, or %own, whose shape is set.
define hidden ptr @lt.optional(ptr %in, i32 %n, i32 %j, ptr %own, ptr %data, i32 %dtype, i32 %rank) {
entry:
  store ptr %data, ptr %own
  %dp = getelementptr %tensor, ptr %own, i32 0, i32 2
  store i32 %dtype, ptr %dp
  %rp = getelementptr %tensor, ptr %own, i32 0, i32 3
  store i32 %rank, ptr %rp
  %inside = icmp slt i32 %j, %n
  br i1 %inside, label %given, label %out
given:
  %t = getelementptr %tensor, ptr %in, i32 %j
  %tp = getelementptr %tensor, ptr %t, i32 0, i32 2
  %code = load i32, ptr %tp
  %zero = icmp eq i32 %code, 0
  %r = select i1 %zero, ptr %own, ptr %t
  ret ptr %r
out:
  ret ptr %own
}

; 64 bits that no other call gets, in the second of two words of the context: the first counts, and clock, process and address tell
; contexts apart (the finalizer of splitmix64).
define hidden ptr @lt.random(ptr %ctx, ptr %words) {
  %s = load i64, ptr %words
  %s1 = add i64 %s, -7046029254386353131
  store i64 %s1, ptr %words
  %now = call i64 @lt.now()
  %pid = call i32 @getpid()
  %pid64 = zext i32 %pid to i64
  %high = shl i64 %pid64, 40
  %at = ptrtoint ptr %ctx to i64
  %a = add i64 %s1, %now
  %b = xor i64 %a, %high
  %c = xor i64 %b, %at
  %c1 = lshr i64 %c, 30
  %d = xor i64 %c, %c1
  %e = mul i64 %d, -4658895280553007687
  %e1 = lshr i64 %e, 27
  %f = xor i64 %e, %e1
  %g = mul i64 %f, -7723592293110705685
  %g1 = lshr i64 %g, 31
  %h = xor i64 %g, %g1
  %p = getelementptr i64, ptr %words, i64 1
  store i64 %h, ptr %p
  ret ptr %p
}

; Memory for an output: the caller's array when it is large enough, else a new one (released by lt_free).
define hidden void @lt.output(ptr %ctx, ptr %t, ptr %name, ptr %word, i64 %bytes) {
  %p = load ptr, ptr %t
  %cp = getelementptr %tensor, ptr %t, i32 0, i32 1
  %none = icmp eq ptr %p, null
  br i1 %none, label %make, label %given
given:
  %c = load i64, ptr %cp
  %small = icmp slt i64 %c, %bytes
  br i1 %small, label %fail, label %use
fail:
  %m = call ptr @lt.msg(ptr %ctx)
  call i32 (ptr, i64, ptr, ...) @snprintf(ptr %m, i64 512, ptr @lt.e.out, ptr %name, i64 %bytes, i64 %c)
  call void @lt.status(ptr %ctx, i32 2)
  ret void
use:
  store ptr %p, ptr %word
  ret void
make:
  %q = call ptr @lt.alloc(i64 %bytes)
  %bad = icmp eq ptr %q, null
  br i1 %bad, label %nomem, label %made
nomem:
  call void @lt.no_memory(ptr %ctx, i64 %bytes, ptr %name)
  ret void
made:
  store ptr %q, ptr %t
  store i64 %bytes, ptr %cp
  store ptr %q, ptr %word
  ret void
}

; A buffer that the context keeps: word is its address, the next word its capacity.
define hidden void @lt.grow(ptr %ctx, ptr %word, i64 %bytes, ptr %name) {
  %cp = getelementptr i8, ptr %word, i64 8
  %c = load i64, ptr %cp
  %p = load ptr, ptr %word
  %none = icmp eq ptr %p, null
  %small = icmp slt i64 %c, %bytes
  %need = or i1 %none, %small
  br i1 %need, label %make, label %ok
make:
  call void @free(ptr %p)
  store ptr null, ptr %word
  store i64 0, ptr %cp
  %q = call ptr @lt.alloc(i64 %bytes)
  %bad = icmp eq ptr %q, null
  br i1 %bad, label %nomem, label %made
nomem:
  call void @lt.no_memory(ptr %ctx, i64 %bytes, ptr %name)
  ret void
made:
  store ptr %q, ptr %word
  store i64 %bytes, ptr %cp
  ret void
ok:
  ret void
}

define hidden ptr @lt.arena(ptr %ctx, i64 %bytes) {
  %w = getelementptr %ctx, ptr %ctx, i32 0, i32 15
  call void @lt.grow(ptr %ctx, ptr %w, i64 %bytes, ptr @lt.s.arena)
  %p = load ptr, ptr %w
  ret ptr %p
}

; ------------------------------------------------------------------ waiting

define hidden i64 @lt.now() {
  %t = alloca [2 x i64]
  %rc = call i32 @clock_gettime(i32 1, ptr %t)
  %s = load i64, ptr %t
  %np = getelementptr i64, ptr %t, i64 1
  %n = load i64, ptr %np
  %a = mul i64 %s, 1000000000
  %r = add i64 %a, %n
  ret i64 %r
}

; Until the word differs from old: a few pauses, then yields for %spin ns, then sleep.
define hidden void @lt.wait(ptr %word, i32 %old, ptr %sleepers, i64 %spin) {
entry:
  %nospin = icmp sle i64 %spin, 0
  br i1 %nospin, label %sleep, label %fast
fast:
  %i = phi i32 [ 0, %entry ], [ %i1, %fast2 ]
  %v = load atomic i32, ptr %word acquire, align 4
  %c = icmp eq i32 %v, %old
  br i1 %c, label %fast2, label %done
fast2:
  @PAUSE@
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, 100
  br i1 %more, label %fast, label %slow0
slow0:
  %t0 = call i64 @lt.now()
  br label %slow
slow:
  %v2 = load atomic i32, ptr %word acquire, align 4
  %c2 = icmp eq i32 %v2, %old
  br i1 %c2, label %slow2, label %done
slow2:
  %y = call i32 @sched_yield()
  %t1 = call i64 @lt.now()
  %dt = sub i64 %t1, %t0
  %in = icmp slt i64 %dt, %spin
  br i1 %in, label %slow, label %sleep
sleep:
  %a = atomicrmw add ptr %sleepers, i32 1 seq_cst
  br label %check
check:
  %v3 = load atomic i32, ptr %word seq_cst, align 4
  %c3 = icmp eq i32 %v3, %old
  br i1 %c3, label %block, label %awake
block:
  %rc = call i64 (i64, ...) @syscall(i64 @SYS_FUTEX@, ptr %word, i64 128, i32 %old, ptr null, ptr null, i64 0)
  br label %check
awake:
  %b = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  ret void
done:
  ret void
}

; Wake whoever sleeps on a word that was just changed.
define hidden void @lt.wake(ptr %word, ptr %sleepers) {
  %s = atomicrmw add ptr %sleepers, i32 0 seq_cst
  %any = icmp sgt i32 %s, 0
  br i1 %any, label %wake, label %out
wake:
  %rc = call i64 (i64, ...) @syscall(i64 @SYS_FUTEX@, ptr %word, i64 129, i32 2147483647, ptr null, ptr null, i64 0)
  br label %out
out:
  ret void
}

; All threads of the run arrive; their stores are visible afterwards.
define hidden void @lt.barrier(ptr %st) {
  %np = getelementptr %state, ptr %st, i32 0, i32 3
  %n = load i64, ptr %np
  %one = icmp eq i64 %n, 1
  br i1 %one, label %out, label %arrive
arrive:
  %ctx = load ptr, ptr %st
  %count = getelementptr %ctx, ptr %ctx, i32 0, i32 5
  %gen = getelementptr %ctx, ptr %ctx, i32 0, i32 7
  %sleepers = getelementptr %ctx, ptr %ctx, i32 0, i32 8
  %g = load atomic i32, ptr %gen acquire, align 4
  %a = atomicrmw add ptr %count, i32 1 acq_rel
  %a64 = zext i32 %a to i64
  %last = sub i64 %n, 1
  %is = icmp eq i64 %a64, %last
  br i1 %is, label %release, label %wait
release:
  store atomic i32 0, ptr %count release, align 4
  %g1 = atomicrmw add ptr %gen, i32 1 seq_cst
  call void @lt.wake(ptr %gen, ptr %sleepers)
  ret void
wait:
  %sp = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  %spin = load i64, ptr %sp
  call void @lt.wait(ptr %gen, i32 %g, ptr %sleepers, i64 %spin)
  ret void
out:
  ret void
}

; ------------------------------------------------------------------ parallel loops

; The next loop of this run; its number distinguishes it in the context's word. All threads count its chunks.
define hidden void @lt.begin_loop(ptr %st, i64 %total, i64 %chunk) {
  %p = getelementptr %state, ptr %st, i32 0, i32 2
  %v = load i64, ptr %p
  %w = add i64 %v, 1
  store i64 %w, ptr %p
  %a = add i64 %total, %chunk
  %b = sub i64 %a, 1
  %c = sdiv i64 %b, %chunk
  %n = trunc i64 %c to i32
  call void @lt.count(ptr %st, i32 %n)
  ret void
}

; Chunks that all threads know about, before the place they have reached.
define hidden void @lt.count(ptr %st, i32 %n) {
  %p = getelementptr %state, ptr %st, i32 0, i32 4
  %v = load i32, ptr %p
  %w = add i32 %v, %n
  store i32 %w, ptr %p
  ret void
}

; Chunks that this thread has finished.
define hidden void @lt.finish(ptr %st, i32 %n) {
  %np = getelementptr %state, ptr %st, i32 0, i32 3
  %t = load i64, ptr %np
  %one = icmp eq i64 %t, 1
  %zero = icmp eq i32 %n, 0
  %skip = or i1 %one, %zero
  br i1 %skip, label %out, label %add
add:
  %ctx = load ptr, ptr %st
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 2
  %s = getelementptr %ctx, ptr %ctx, i32 0, i32 3
  %o = atomicrmw add ptr %p, i32 %n seq_cst
  call void @lt.wake(ptr %p, ptr %s)
  ret void
out:
  ret void
}

; Until everything before this place is complete.
define hidden void @lt.wait_all(ptr %st) {
entry:
  %np = getelementptr %state, ptr %st, i32 0, i32 3
  %t = load i64, ptr %np
  %one = icmp eq i64 %t, 1
  br i1 %one, label %out, label %many
many:
  %ctx = load ptr, ptr %st
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 2
  %s = getelementptr %ctx, ptr %ctx, i32 0, i32 3
  %kp = getelementptr %state, ptr %st, i32 0, i32 4
  %k = load i32, ptr %kp
  %sp = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  %spin = load i64, ptr %sp
  br label %check
check:
  %v = load atomic i32, ptr %p acquire, align 4
  %left = sub i32 %k, %v
  %more = icmp sgt i32 %left, 0
  br i1 %more, label %wait, label %out
wait:
  call void @lt.wait(ptr %p, i32 %v, ptr %s, i64 %spin)
  br label %check
out:
  ret void
}

; About four chunks a thread, no chunk below the grain.
define hidden i64 @lt.chunk(ptr %st, i64 %total, i64 %grain) {
  %np = getelementptr %state, ptr %st, i32 0, i32 3
  %n = load i64, ptr %np
  %n4 = shl i64 %n, 2
  %a = add i64 %total, %n4
  %b = sub i64 %a, 1
  %c = sdiv i64 %b, %n4
  %r = call i64 @llvm.smax.i64(i64 %c, i64 %grain)
  ret i64 %r
}

; Start of a chunk that nobody has, or -1.
define hidden i64 @lt.claim(ptr %st, i64 %lo, i64 %hi, i64 %chunk) {
entry:
  %ctx = load ptr, ptr %st
  %sp = getelementptr %state, ptr %st, i32 0, i32 2
  %seq = load i64, ptr %sp
  %v0 = load atomic i64, ptr %ctx acquire, align 8
  br label %try
try:
  %v = phi i64 [ %v0, %entry ], [ %v1, %take ]
  %e = lshr i64 %v, 32
  %past = icmp ugt i64 %e, %seq
  br i1 %past, label %none, label %mine
mine:
  %same = icmp eq i64 %e, %seq
  %k0 = and i64 %v, 4294967295
  %k = select i1 %same, i64 %k0, i64 0
  %off = mul i64 %k, %chunk
  %start = add i64 %lo, %off
  %over = icmp sge i64 %start, %hi
  br i1 %over, label %none, label %take
take:
  %hiword = shl i64 %seq, 32
  %k1 = add i64 %k, 1
  %want = or i64 %hiword, %k1
  %x = cmpxchg ptr %ctx, i64 %v, i64 %want acq_rel acquire
  %v1 = extractvalue { i64, i1 } %x, 0
  %okc = extractvalue { i64, i1 } %x, 1
  br i1 %okc, label %got, label %try
got:
  ret i64 %start
none:
  ret i64 -1
}

; Profile: time since the last mark is added to call %k. The call is complete first.
define hidden void @lt.mark(ptr %st, i64 %k) {
  %ctx = load ptr, ptr %st
  %pp = getelementptr %ctx, ptr %ctx, i32 0, i32 19
  %prof = load ptr, ptr %pp
  %off = icmp eq ptr %prof, null
  br i1 %off, label %out, label %on
on:
  call void @lt.wait_all(ptr %st)
  %tp = getelementptr %state, ptr %st, i32 0, i32 1
  %tid = load i64, ptr %tp
  %first = icmp eq i64 %tid, 0
  br i1 %first, label %write, label %out
write:
  %mp = getelementptr %ctx, ptr %ctx, i32 0, i32 21
  %m = load i64, ptr %mp
  %now = call i64 @lt.now()
  %d = sub i64 %now, %m
  store i64 %now, ptr %mp
  %k2 = shl i64 %k, 1
  %p0 = getelementptr i64, ptr %prof, i64 %k2
  %s = load i64, ptr %p0
  %s1 = add i64 %s, %d
  store i64 %s1, ptr %p0
  %p1 = getelementptr i64, ptr %p0, i64 1
  %c = load i64, ptr %p1
  %c1 = add i64 %c, 1
  store i64 %c1, ptr %p1
  ret void
out:
  ret void
}

; ------------------------------------------------------------------ threads

define hidden ptr @lt.worker(ptr %arg) {
entry:
  %st = alloca %state
  %ctx = load ptr, ptr %arg
  %ap = getelementptr %worker, ptr %arg, i32 0, i32 1
  %tid = load i64, ptr %ap
  %gate = getelementptr %ctx, ptr %ctx, i32 0, i32 10
  %runs = getelementptr i8, ptr %gate, i64 4
  %wsleep = getelementptr %ctx, ptr %ctx, i32 0, i32 11
  %tsleep = getelementptr %ctx, ptr %ctx, i32 0, i32 12
  %stop = getelementptr %ctx, ptr %ctx, i32 0, i32 25
  %np = getelementptr %ctx, ptr %ctx, i32 0, i32 27
  %spinp = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  br label %loop
loop:
  %seen = phi i32 [ 0, %entry ], [ %seen, %wait ], [ %run, %missed ], [ %seen, %enter ], [ %run, %ran ], [ %run, %last ]
  %v = load atomic i64, ptr %gate seq_cst, align 8
  %run64 = lshr i64 %v, 32
  %run = trunc i64 %run64 to i32
  %same = icmp eq i32 %run, %seen
  br i1 %same, label %wait, label %new
wait:
  %spin = load i64, ptr %spinp
  call void @lt.wait(ptr %runs, i32 %seen, ptr %wsleep, i64 %spin)
  br label %loop
new:
  %s = load atomic i32, ptr %stop acquire, align 4
  %end = icmp ne i32 %s, 0
  br i1 %end, label %out, label %try
try:
  %o = and i64 %v, 2147483648
  %closed = icmp eq i64 %o, 0
  %crew = load i32, ptr %np
  %crew64 = zext i32 %crew to i64
  %spare = icmp uge i64 %tid, %crew64
  %stay = or i1 %closed, %spare
  br i1 %stay, label %missed, label %enter
missed:
  br label %loop
enter:
  %v1 = add i64 %v, 1
  %x = cmpxchg ptr %gate, i64 %v, i64 %v1 seq_cst seq_cst
  %in = extractvalue { i64, i1 } %x, 1
  br i1 %in, label %go, label %loop
go:
  %n = load i32, ptr %np
  %n64 = zext i32 %n to i64
  call void @lt.state(ptr %st, ptr %ctx, i64 %tid, i64 %n64)
  call void @lt_main(ptr %st)
  %left = atomicrmw sub ptr %gate, i64 1 seq_cst
  %low = and i64 %left, 4294967295
  %empty = icmp eq i64 %low, 1
  br i1 %empty, label %last, label %ran
last:
  call void @lt.wake(ptr %gate, ptr %tsleep)
  br label %loop
ran:
  br label %loop
out:
  ret ptr null
}

define hidden void @lt.state(ptr %st, ptr %ctx, i64 %tid, i64 %n) {
  store ptr %ctx, ptr %st
  %p1 = getelementptr %state, ptr %st, i32 0, i32 1
  store i64 %tid, ptr %p1
  %p2 = getelementptr %state, ptr %st, i32 0, i32 2
  store i64 0, ptr %p2
  %p3 = getelementptr %state, ptr %st, i32 0, i32 3
  store i64 %n, ptr %p3
  %p4 = getelementptr %state, ptr %st, i32 0, i32 4
  store i32 0, ptr %p4
  ret void
}

; The gate of the next run, open or not; workers wake.
define hidden void @lt.next_run(ptr %ctx, i64 %open) {
  %gate = getelementptr %ctx, ptr %ctx, i32 0, i32 10
  %runs = getelementptr i8, ptr %gate, i64 4
  %wsleep = getelementptr %ctx, ptr %ctx, i32 0, i32 11
  %v = load i64, ptr %gate
  %r = lshr i64 %v, 32
  %r1 = add i64 %r, 1
  %hi = shl i64 %r1, 32
  %new = or i64 %hi, %open
  store atomic i64 %new, ptr %gate seq_cst, align 8
  call void @lt.wake(ptr %runs, ptr %wsleep)
  ret void
}

; No worker enters any more, and those inside have left.
define hidden void @lt.close(ptr %ctx) {
entry:
  %gate = getelementptr %ctx, ptr %ctx, i32 0, i32 10
  %tsleep = getelementptr %ctx, ptr %ctx, i32 0, i32 12
  %sp = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  %spin = load i64, ptr %sp
  %v0 = atomicrmw and ptr %gate, i64 -2147483649 seq_cst
  br label %check
check:
  %w = load atomic i32, ptr %gate seq_cst, align 4
  %none = icmp eq i32 %w, 0
  br i1 %none, label %out, label %wait
wait:
  call void @lt.wait(ptr %gate, i32 %w, ptr %tsleep, i64 %spin)
  br label %check
out:
  ret void
}

; Workers of this process (a forked child starts its own); the number of threads of a run.
define hidden i32 @lt.pool(ptr %ctx) {
entry:
  %all = alloca [16 x i64]
  %old = alloca [16 x i64]
  %pidp = getelementptr %ctx, ptr %ctx, i32 0, i32 24
  %runp = getelementptr %ctx, ptr %ctx, i32 0, i32 23
  %wantp = getelementptr %ctx, ptr %ctx, i32 0, i32 22
  %pid = call i32 @getpid()
  %was = load i32, ptr %pidp
  %same = icmp eq i32 %pid, %was
  br i1 %same, label %have, label %make
make:
  %h = getelementptr i8, ptr %ctx, i64 64
  call void @llvm.memset.p0.i64(ptr %h, i8 0, i64 256, i1 false)
  %stop = getelementptr %ctx, ptr %ctx, i32 0, i32 25
  store i32 0, ptr %stop
  store i32 0, ptr %runp
  store i32 %pid, ptr %pidp
  %want = load i32, ptr %wantp
  %want64 = sext i32 %want to i64
  %wp = getelementptr %ctx, ptr %ctx, i32 0, i32 20
  %oldw = load ptr, ptr %wp
  call void @free(ptr %oldw)
  %ws = call ptr @calloc(i64 %want64, i64 24)
  store ptr %ws, ptr %wp
  %bad = icmp eq ptr %ws, null
  br i1 %bad, label %have, label %mask
mask:
  call void @llvm.memset.p0.i64(ptr %all, i8 -1, i64 128, i1 false)
  %m0 = call i32 @pthread_sigmask(i32 2, ptr %all, ptr %old)
  br label %loop
loop:
  %t = phi i64 [ 1, %mask ], [ %t1, %made ]
  %more = icmp slt i64 %t, %want64
  br i1 %more, label %spawn, label %unmask
spawn:
  %w = getelementptr %worker, ptr %ws, i64 %t
  store ptr %ctx, ptr %w
  %w1 = getelementptr %worker, ptr %w, i32 0, i32 1
  store i64 %t, ptr %w1
  %w2 = getelementptr %worker, ptr %w, i32 0, i32 2
  %rc = call i32 @pthread_create(ptr %w2, ptr null, ptr @lt.worker, ptr %w)
  %no = icmp ne i32 %rc, 0
  br i1 %no, label %unmask, label %made
made:
  %r = trunc i64 %t to i32
  store i32 %r, ptr %runp
  %t1 = add i64 %t, 1
  br label %loop
unmask:
  %m1 = call i32 @pthread_sigmask(i32 2, ptr %old, ptr null)
  br label %have
have:
  %n = load i32, ptr %runp
  %n1 = add i32 %n, 1
  ret i32 %n1
}

; ------------------------------------------------------------------ the ABI (see model.h)

define i32 @lt_abi_version() {
  ret i32 1
}

define ptr @lt_create(ptr %weights, i64 %bytes, i32 %threads) {
entry:
  %set = alloca [16 x i64]
  %need = load i64, ptr @lt.weights_bytes
  %short = icmp slt i64 %bytes, %need
  %addr = ptrtoint ptr %weights to i64
  %low = and i64 %addr, 63
  %odd = icmp ne i64 %low, 0
  %some = icmp sgt i64 %need, 0
  %skew = and i1 %odd, %some
  %bad = or i1 %short, %skew
  br i1 %bad, label %fail, label %make
make:
  %size = load i64, ptr @lt.ctx_bytes
  %ctx = call ptr @lt.alloc(i64 %size)
  %null = icmp eq ptr %ctx, null
  br i1 %null, label %fail, label %init
init:
  call void @llvm.memset.p0.i64(ptr %ctx, i8 0, i64 %size, i1 false)
  %wp = getelementptr %ctx, ptr %ctx, i32 0, i32 14
  store ptr %weights, ptr %wp
  %sp = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  store i64 50000, ptr %sp
  %tp = getelementptr %ctx, ptr %ctx, i32 0, i32 22
  %given = icmp sgt i32 %threads, 0
  br i1 %given, label %asked, label %count
asked:
  store i32 %threads, ptr %tp
  ret ptr %ctx
count:
  call void @llvm.memset.p0.i64(ptr %set, i8 0, i64 128, i1 false)
  %rc = call i32 @sched_getaffinity(i32 0, i64 128, ptr %set)
  br label %sum
sum:
  %i = phi i64 [ 0, %count ], [ %i1, %sum ]
  %acc = phi i64 [ 0, %count ], [ %acc1, %sum ]
  %p = getelementptr i64, ptr %set, i64 %i
  %v = load i64, ptr %p
  %b = call i64 @llvm.ctpop.i64(i64 %v)
  %acc1 = add i64 %acc, %b
  %i1 = add i64 %i, 1
  %c = icmp slt i64 %i1, 16
  br i1 %c, label %sum, label %store
store:
  %cpus = call i64 @llvm.smax.i64(i64 %acc1, i64 1)
  %n = trunc i64 %cpus to i32
  store i32 %n, ptr %tp
  ret ptr %ctx
fail:
  ret ptr null
}

define void @lt_set_spin(ptr %ctx, i64 %ns) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 28
  store i64 %ns, ptr %p
  ret void
}

define i32 @lt_threads(ptr %ctx) {
  %par = load i32, ptr @lt.parallel
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 22
  %n = load i32, ptr %p
  %one = icmp eq i32 %par, 0
  %r = select i1 %one, i32 1, i32 %n
  ret i32 %r
}

define void @lt_set_profile(ptr %ctx, ptr %times) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 19
  store ptr %times, ptr %p
  ret void
}

define ptr @lt_message(ptr %ctx) {
  %p = getelementptr %ctx, ptr %ctx, i32 0, i32 31
  ret ptr %p
}

define void @lt_free(ptr %p) {
  call void @free(ptr %p)
  ret void
}

define i32 @lt_infer(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m) {
  call void @lt.status(ptr %ctx, i32 0)
  %rc = call i32 @lt_bind(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m)
  ret i32 %rc
}

define i32 @lt_run(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m) {
entry:
  %st = alloca %state
  call void @lt.status(ptr %ctx, i32 0)
  %ip = getelementptr %ctx, ptr %ctx, i32 0, i32 17
  store ptr %in, ptr %ip
  %op = getelementptr %ctx, ptr %ctx, i32 0, i32 18
  store ptr %out, ptr %op
  %rc = call i32 @lt_bind(ptr %ctx, ptr %in, i32 %n, ptr %out, i32 %m)
  %bad = icmp ne i32 %rc, 0
  br i1 %bad, label %fail, label %place
place:
  %rc2 = call i32 @lt_place(ptr %ctx, ptr %in, ptr %out)
  %bad2 = icmp ne i32 %rc2, 0
  br i1 %bad2, label %fail2, label %start
start:
  store i64 0, ptr %ctx
  %profp = getelementptr %ctx, ptr %ctx, i32 0, i32 19
  %prof = load ptr, ptr %profp
  %timed = icmp ne ptr %prof, null
  br i1 %timed, label %clock, label %threads
clock:
  %mp = getelementptr %ctx, ptr %ctx, i32 0, i32 21
  %now = call i64 @lt.now()
  store i64 %now, ptr %mp
  br label %threads
threads:
  %want = call i32 @lt_threads(ptr %ctx)
  %many = icmp sgt i32 %want, 1
  br i1 %many, label %pool, label %go
pool:
  %worthp = getelementptr %ctx, ptr %ctx, i32 0, i32 29
  %worth = load i64, ptr %worthp
  %two = icmp sgt i64 %worth, 1
  br i1 %two, label %crew, label %go
crew:
  %have = call i32 @lt.pool(ptr %ctx)
  %have64 = zext i32 %have to i64
  %use64 = call i64 @llvm.smin.i64(i64 %have64, i64 %worth)
  %use = trunc i64 %use64 to i32
  br label %go
go:
  %t = phi i32 [ 1, %threads ], [ 1, %pool ], [ %use, %crew ]
  %t64 = zext i32 %t to i64
  %np = getelementptr %ctx, ptr %ctx, i32 0, i32 27
  store i32 %t, ptr %np
  call void @lt.state(ptr %st, ptr %ctx, i64 0, i64 %t64)
  %shared = icmp sgt i32 %t, 1
  br i1 %shared, label %open, label %alone
alone:
  call void @lt_main(ptr %st)
  br label %end
open:
  %donep = getelementptr %ctx, ptr %ctx, i32 0, i32 2
  store i32 0, ptr %donep
  call void @lt.next_run(ptr %ctx, i64 2147483648)
  call void @lt_main(ptr %st)
  call void @lt.close(ptr %ctx)
  br label %end
end:
  %rp = getelementptr %ctx, ptr %ctx, i32 0, i32 26
  %r = load i32, ptr %rp
  ret i32 %r
fail:
  ret i32 %rc
fail2:
  ret i32 %rc2
}

define void @lt_destroy(ptr %ctx) {
entry:
  %none = icmp eq ptr %ctx, null
  br i1 %none, label %out, label %threads
threads:
  %pidp = getelementptr %ctx, ptr %ctx, i32 0, i32 24
  %was = load i32, ptr %pidp
  %pid = call i32 @getpid()
  %wp = getelementptr %ctx, ptr %ctx, i32 0, i32 20
  %ws = load ptr, ptr %wp
  %same = icmp eq i32 %pid, %was
  br i1 %same, label %stop, label %release
stop:
  %stopp = getelementptr %ctx, ptr %ctx, i32 0, i32 25
  store atomic i32 1, ptr %stopp release, align 4
  call void @lt.next_run(ptr %ctx, i64 0)
  %runp = getelementptr %ctx, ptr %ctx, i32 0, i32 23
  %n = load i32, ptr %runp
  %n64 = sext i32 %n to i64
  br label %join
join:
  %t = phi i64 [ 1, %stop ], [ %t1, %one ]
  %more = icmp sle i64 %t, %n64
  br i1 %more, label %one, label %release
one:
  %hp = getelementptr %worker, ptr %ws, i64 %t, i32 2
  %h = load i64, ptr %hp
  %rc = call i32 @pthread_join(i64 %h, ptr null)
  %t1 = add i64 %t, 1
  br label %join
release:
  call void @free(ptr %ws)
  %ap = getelementptr %ctx, ptr %ctx, i32 0, i32 15
  %arena = load ptr, ptr %ap
  call void @free(ptr %arena)
  %dyn = load i64, ptr @lt.dyn_count
  %first = load i64, ptr @lt.dyn_first
  br label %each
each:
  %k = phi i64 [ 0, %release ], [ %k1, %drop ]
  %left = icmp slt i64 %k, %dyn
  br i1 %left, label %drop, label %last
drop:
  %k2 = shl i64 %k, 1
  %at = add i64 %first, %k2
  %dp = getelementptr %ctx, ptr %ctx, i32 0, i32 32, i64 %at
  %d = load ptr, ptr %dp
  call void @free(ptr %d)
  %k1 = add i64 %k, 1
  br label %each
last:
  call void @free(ptr %ctx)
  ret void
out:
  ret void
}
