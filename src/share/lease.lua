-- Leases of shared limits. KEYS: a hash for each request. ARGV: for how long a lease holds in microseconds, the replica, and for
-- each request flow, cost, burst, quota, monthly, used, keeps (-1: as it is), the cost of what waits, how many, ahead.
-- Answers for each: passed, ahead, microseconds to wait, by quota, rate left, quota left.
-- All numbers are whole and below 2^53. The server's clock decides.
local ttl, me = tonumber(ARGV[1]), 'l:' .. ARGV[2]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local DAY = 86400000000
local floor, max, min = math.floor, math.max, math.min

local function whole(number) return string.format('%.0f', number) end

-- Howard Hinnant's civil_from_days and days_from_civil, by months since the year 0.
local function month_of(days)
  local since = days + 719468
  local era = floor(since / 146097)
  local of_era = since % 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  return (era * 400 + year) * 12 + floor((5 * of_year + 2) / 153) + 2
end
local function first_day_of(month)
  local from_march = month - 2
  local year = floor(from_march / 12)
  from_march = from_march % 12
  local era = floor(year / 400)
  local of_year = floor((153 * from_march + 2) / 5)
  local y = year % 400
  return era * 146097 + y * 365 + floor(y / 4) - floor(y / 100) + of_year - 719468
end

local answers = {}
for index, key in ipairs(KEYS) do
  local at = 2 + (index - 1) * 10
  local function arg(place) return tonumber(ARGV[at + place]) end
  local flow, unit, burst, quota, monthly = arg(1), arg(2), arg(3), arg(4), arg(5)
  local used, keeps, cost, count, ahead = arg(6), arg(7), arg(8), arg(9), arg(10)
  local fields = redis.call('HGETALL', key)
  local debt, seen, spent, period, own, others, last = 0, now, 0, 0, 0, 0, 0
  local over = {}
  for place = 1, #fields, 2 do
    local name, value = fields[place], fields[place + 1]
    if name == 'd' then debt = tonumber(value)
    elseif name == 'a' then seen = tonumber(value)
    elseif name == 'u' then spent = tonumber(value)
    elseif name == 'p' then period = tonumber(value) end
  end
  debt = max(0, debt - max(0, now - seen) * flow)
  local days = floor(now / DAY)
  local current = days
  if monthly > 0 then current = month_of(days) end
  -- A clock that was set back by a little must not give the quota anew.
  if period ~= current and period ~= current + 1 then spent, period = 0, current end
  for place = 1, #fields, 2 do
    local name = fields[place]
    if string.sub(name, 1, 2) == 'l:' then
      local held, ends = string.match(fields[place + 1], '^(%d+) (%d+)$')
      held, ends = tonumber(held), tonumber(ends)
      if ends <= now then
        -- It may have been used, and nobody says so any more.
        debt, spent = debt + held * unit, spent + held
        over[#over + 1] = name
      elseif name == me then own = held
      else others, last = others + held, max(last, ends) end
    end
  end
  local told = min(used, own)
  debt, spent, own = debt + told * unit, spent + told, own - told
  if keeps >= 0 then own = keeps end
  local room = 9007199254740991
  if burst > 0 then room = min(room, floor((burst * unit - debt) / unit) - others - own) end
  if quota > 0 then room = min(room, quota - spent - others - own) end
  room = max(0, room)
  local passed = 0
  if cost > 0 then passed = min(count, floor(room / cost)) end
  debt, spent, room = debt + passed * cost * unit, spent + passed * cost, room - passed * cost
  local got = 0
  if passed == count then got = min(ahead, room) end
  own = own + got
  local rest = (days + 1) * DAY - now
  if monthly > 0 then rest = first_day_of(current + 1) * DAY - now end
  local wait, by_quota = 0, 0
  if passed < count then
    if burst > 0 then wait = max(0, math.ceil((debt + (others + own + cost) * unit - burst * unit) / flow)) end
    if quota > 0 and quota - spent - others - own < cost then
      local longer = rest
      -- Others may give back what they hold.
      if quota - spent >= cost then longer = ttl end
      if longer > wait then wait, by_quota = longer, 1 end
    end
    wait = max(1, wait)
  end
  if #over > 0 then redis.call('HDEL', key, unpack(over)) end
  redis.call('HSET', key, 'd', whole(debt), 'a', whole(now), 'u', whole(spent), 'p', whole(period))
  if own > 0 then
    redis.call('HSET', key, me, whole(own) .. ' ' .. whole(now + ttl))
    last = max(last, now + ttl)
  else
    redis.call('HDEL', key, me)
  end
  -- As good as new after this: full, and leased to nobody.
  local keep = 0
  if burst > 0 then keep = math.ceil((debt + (others + own) * unit) / flow) end
  if others + own > 0 then keep = keep + max(0, last - now) end
  if quota > 0 and spent + others + own > 0 then keep = max(keep, rest) end
  redis.call('PEXPIRE', key, whole(max(1000, math.ceil(keep / 1000) + 1000)))
  local rate_left, quota_left = 0, 0
  if burst > 0 then rate_left = max(0, floor((burst * unit - debt) / unit) - others - own) end
  if quota > 0 then quota_left = max(0, quota - spent - others - own) end
  answers[index] = { passed, got, wait, by_quota, rate_left, quota_left }
end
return answers
