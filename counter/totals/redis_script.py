"""How Redis applies a commit: the script, and which error replies say that it applied nothing.

Redis does not take back what a script has written when a later command of it fails: a permission
that is withdrawn in between is enough. So the invariant is that one command, MSET, writes both the
total and the record of the writer, and they agree whatever fails. Before it nothing is written;
after it nothing matters. Where anything fails up to it, the script says so in a word of its own.

A record is the number and the token of its writer's last commit and the value before it. A commit
with a higher number is applied. The same number and token is the same commit, asked for again, and
gets the same answer, if its record can still be written: a primary that was demoted may hold what
the new one never heard of. Anything else is another writer's, of the same identity, or a commit
that the network delivers long after; nothing is applied, and nothing answered from the record.

A number in a script is a double, so the value passes through as bytes, and is added to by halves of
32 bits. No connection here, and no decision what to do next.
"""

from __future__ import annotations

import hashlib
from typing import Final

# First words of the script's own error replies.
NOT_ADDED: Final = "NOTADDED"
NOT_MINE: Final = "NOTMINE"

# KEYS: total, record of the writer. ARGV: number and token of the commit, the upper and the lower
# 32 bits of the amount, life of the record in seconds. Gives back the value before the commit.
# MSET takes away the life that either key had. A record whose EXPIRE fails only stays for longer.
SCRIPT: Final = b"""
local function not_added(why)
  return redis.error_reply('NOTADDED ' .. why)
end
local value = redis.pcall('GET', KEYS[1])
local record = redis.pcall('GET', KEYS[2])
if type(value) == 'table' then return not_added(value.err) end
if type(record) == 'table' then return not_added(record.err) end
if record then
  local number, token, answer = string.match(record, '^(%d+) (%S+) (.*)$')
  if number == ARGV[1] and token == ARGV[2] then
    local done = redis.pcall('MSET', KEYS[2], record)
    if done.err then return not_added(done.err) end
    redis.pcall('EXPIRE', KEYS[2], ARGV[5])
    return answer
  end
  if not number or tonumber(number) >= tonumber(ARGV[1]) then
    return redis.error_reply('NOTMINE another writer has this identity')
  end
end
value = value or 'counter1' .. string.rep('\\0', 16)
if #value ~= 24 or string.sub(value, 1, 8) ~= 'counter1' then
  return not_added('the key holds no total of this program')
end
local high, low, commits_high, commits_low = struct.unpack('>I4I4I4I4', value, 9)
low = low + ARGV[4]
high = high + ARGV[3] + math.floor(low / 2^32)
commits_low = commits_low + 1
commits_high = commits_high + math.floor(commits_low / 2^32)
local after = 'counter1' .. struct.pack('>I4I4I4I4', high % 2^32, low % 2^32,
                                        commits_high % 2^32, commits_low % 2^32)
local done = redis.pcall('MSET', KEYS[1], after,
                         KEYS[2], ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. value)
if done.err then return not_added(done.err) end
redis.pcall('EXPIRE', KEYS[2], ARGV[5])
return value
"""
SCRIPT_HASH: Final = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest()

# First words of the error replies that Redis gives instead of running a command, and the script's.
UNDONE: Final = frozenset(
    {
        NOT_ADDED,
        NOT_MINE,
        "ASK",
        "BUSY",
        "CLUSTERDOWN",
        "CROSSSLOT",
        "DENIED",
        "LOADING",
        "MASTERDOWN",
        "MISCONF",
        "MOVED",
        "NOAUTH",
        "NOPERM",
        "NOREPLICAS",
        "NOSCRIPT",
        "OOM",
        "READONLY",
        "TRYAGAIN",
        "WRONGPASS",
    }
)
